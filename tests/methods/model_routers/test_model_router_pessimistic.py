"""What the model router pessimistic promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import NAN, lessons

from mixtura.methods.model_routers.pessimistic import Pessimistic


def test_what_was_never_logged_never_beats_what_was() -> None:
    given = lessons([[1.0]] * 400, [[0.1, NAN]] * 400)
    router = Pessimistic(scale=0.1)
    router.fit(given)
    assert router.decide(given.batch, given.cards, given.costs)[0].model == "a"


def test_logs_of_an_expert_are_imitated() -> None:
    points = np.eye(2)[[0] * 100 + [1] * 100].tolist()
    given = lessons(points, [[0.7, NAN]] * 100 + [[NAN, 0.6]] * 100)
    router = Pessimistic(num_contexts=2)
    router.fit(given)
    made = [one.model for one in router.decide(given.batch, given.cards, given.costs)]
    assert made == ["a"] * 100 + ["b"] * 100


def test_many_outcomes_make_it_greedy() -> None:
    def choice(count: int) -> str | None:
        # b is better, and was tried a tenth as often.
        rows = [[0.6, NAN]] * (10 * count) + [[NAN, 0.7]] * count
        given = lessons([[1.0]] * len(rows), rows)
        router = Pessimistic()
        router.fit(given)
        return router.decide(given.batch, given.cards, given.costs)[0].model

    assert (choice(10), choice(1000)) == ("a", "b")


def test_the_penalty_is_that_of_hoeffding() -> None:
    given = lessons([[1.0]] * 50, [[1.0]] * 50)
    router = Pessimistic(failure=0.1)
    router.fit(given)
    assert np.isclose(router.score(given.batch).quality[0, 0], 1 - np.sqrt(np.log(2 / 0.1) / 100))
