"""What the model router best_single promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import NAN, lessons

from mixtura.methods.model_routers.best_single import BestSingle
from mixtura.types.models import Wish


def test_the_best_mean_is_chosen_and_a_lucky_single_outcome_is_not_sure() -> None:
    given = lessons([[1.0]] * 4, [[1, NAN], [1, NAN], [0, NAN], [1, 1]])
    router = BestSingle()
    router.fit(given)
    found = router.score(given.batch)
    assert np.allclose(found.quality[0], [0.75, 1.0])
    assert found.error[0, 1] > found.error[0, 0] > 0


def test_with_a_floor_it_abstains_where_it_is_not_sure() -> None:
    given = lessons([[1.0]] * 4, [[1, NAN], [1, NAN], [0, NAN], [1, 1]])
    router = BestSingle()
    router.fit(given)
    (one, *_) = router.decide(given.batch, given.cards, given.costs, Wish(floor=0.7, confidence=2.0))
    assert one.abstained
    assert one.models == ()
    (one, *_) = router.decide(given.batch, given.cards, given.costs, Wish(floor=0.7, fallback="a"))
    assert (one.abstained, one.models) == (True, ("a",))
    assert not router.decide(given.batch, given.cards, given.costs, Wish(floor=0.2))[0].abstained
