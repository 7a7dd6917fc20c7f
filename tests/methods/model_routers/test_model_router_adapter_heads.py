"""What the model router adapter_heads promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from model_lessons import lessons

from mixtura.errors import SettingError
from mixtura.methods.model_routers.adapter_heads import AdapterHeads

POINTS = np.eye(3)[[0] * 5 + [1] * 5 + [2] * 5].tolist()
SCORES = [[1, 0, 0]] * 5 + [[0, 1, 0]] * 5 + [[0, 0, 1]] * 5


def test_a_new_task_leaves_old_heads_bit_for_bit() -> None:
    given = lessons(POINTS, SCORES)
    router = AdapterHeads(base="a")
    router.fit(replace(given, cards=given.cards[:2], scores=given.scores[:, :2], costs=given.costs[:, :2]))
    before = router.state["heads"].copy()
    router.admit(replace(given, cards=given.cards[2:], scores=given.scores[:, 2:], costs=given.costs[:, 2:]))
    assert np.array_equal(router.state["heads"][:, :2], before)
    made = [one.model for one in router.decide(given.batch, given.cards, given.costs)]
    assert made == ["a"] * 5 + ["b"] * 5 + ["c"] * 5


def test_a_high_threshold_keeps_to_the_base() -> None:
    given = lessons(POINTS, SCORES)
    router = AdapterHeads(base="a", threshold=1.0)
    router.fit(given)
    assert {one.model for one in router.decide(given.batch, given.cards, given.costs)} == {"a"}


def test_a_base_that_is_no_model_is_refused() -> None:
    with pytest.raises(
        SettingError, match="base of AdapterHeads is no model of the table; there are: a, b, c"
    ):
        AdapterHeads(base="zz").fit(lessons(POINTS, SCORES))
