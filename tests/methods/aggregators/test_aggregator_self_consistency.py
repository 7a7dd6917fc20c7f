"""What the aggregator self_consistency promises beyond its kind's contract."""

from __future__ import annotations

from itertools import product

import pytest
from scripted_models import run

from mixtura.methods.aggregators.self_consistency import SelfConsistency


def test_independent_answers_are_right_as_often_as_the_binomial_says() -> None:
    chance, right = 0.7, 0.0
    for draws in product([0, 1], repeat=5):
        verdict, *_ = run(
            SelfConsistency(), lambda text, ask, draws=draws: "yes" if draws[ask.sample] else "no"
        )
        weight = 1.0
        for draw in draws:
            weight *= chance if draw else 1 - chance
        right += weight * (verdict.text == "yes")
    expected = 0.7**5 + 5 * 0.7**4 * 0.3 + 10 * 0.7**3 * 0.3**2
    assert right == pytest.approx(expected)


def test_each_sample_is_drawn_anew() -> None:
    _, _, asked = run(SelfConsistency(num_samples=4, temperature=1.0), lambda text, ask: "x")
    assert [ask.sample for ask in asked] == [0, 1, 2, 3]
    assert {ask.temperature for ask in asked} == {1.0}
