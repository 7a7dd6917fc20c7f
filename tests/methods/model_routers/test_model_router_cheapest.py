"""What the model router cheapest promises beyond its kind's contract."""

from __future__ import annotations

from model_lessons import lessons

from mixtura.methods.model_routers.cheapest import Cheapest


def test_the_cheapest_is_chosen_however_bad_and_of_equals_the_first_by_name() -> None:
    given = lessons([[1.0]] * 2, [[0, 1, 1], [0, 1, 1]], costs=[[1, 2, 3], [4, 3, 3]])
    router = Cheapest()
    router.fit(given)
    assert [one.models for one in router.decide(given.batch, given.cards, given.costs)] == [
        ("a", "b", "c"),
        ("b", "c", "a"),
    ]
