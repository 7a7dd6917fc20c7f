"""What the model router random promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

from model_lessons import lessons

from mixtura.methods.model_routers.random import Random
from mixtura.types.models import Wish


def test_models_that_cannot_answer_leave_their_chance_to_others() -> None:
    given = lessons([[1.0]], [[1, 0, 0, 1]])
    cards = tuple(replace(card, context=0 if card.name == "b" else None) for card in given.cards)
    router = Random()
    router.fit(given)
    (one,) = router.decide(given.batch, cards, given.costs, Wish(explore=0.5))
    assert set(one.propensities) == {"a", "c", "d"}
    assert all(abs(share - 1 / 3) < 1e-12 for share in one.propensities.values())
