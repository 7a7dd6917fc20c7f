"""What the model router oracle promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import NAN, lessons

from mixtura.methods.model_routers.oracle import Oracle


def test_it_takes_the_cheapest_of_those_that_were_right() -> None:
    given = lessons([[1.0]] * 3, [[1, 1, 0], [0, 0, 0], [NAN, 0, 1]], costs=[[3, 2, 1]] * 3)
    router = Oracle()
    router.fit(given)
    assert [one.model for one in router.decide(given.batch, given.cards, given.costs)] == ["b", "c", "c"]


def test_prompts_that_it_never_saw_get_the_means() -> None:
    given = lessons([[1.0]] * 2, [[1, 0], [0, 0]])
    router = Oracle()
    router.fit(given)
    other = lessons([[1.0]] * 3, [[0, 0]] * 3)
    assert np.allclose(router.score(other.batch).quality[2], [0.5, 0.0])
