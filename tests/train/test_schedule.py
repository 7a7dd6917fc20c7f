"""The learning rate's shape."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mixtura.train.schedule import Decay, learning_rate_factor


def test_rate_rises_stays_and_falls_to_nothing() -> None:
    decay = Decay(50, 20)
    factors = [learning_rate_factor(step, 10, decay) for step in range(71)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10:50] == [1.0] * 40
    assert all(a > b for a, b in pairwise(factors[50:]))
    assert factors[70] == 0.0
    assert decay.end == 70
