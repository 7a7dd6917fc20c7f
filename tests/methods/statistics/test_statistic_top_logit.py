"""What the statistic top_logit promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.statistics import LayerTokens
from mixtura.methods.statistics.top_logit import TopLogit


def factor(chosen: list[int], logits: list[float]) -> list[float]:
    tokens = LayerTokens(
        chosen=torch.tensor([chosen]), weights=torch.ones(1, len(chosen)), logits=torch.tensor([logits])
    )
    found: list[float] = TopLogit().factor(tokens)[0].tolist()
    return found


def test_of_the_chosen_experts_the_one_of_largest_logit() -> None:
    assert factor([2, 1], [9.0, 1.0, 4.0]) == [4.0, 0.0]
    assert factor([2, 1], [9.0, 5.0, 4.0]) == [0.0, 5.0]


def test_a_negative_logit_can_win() -> None:
    assert factor([1, 0], [-3.0, -2.0, 5.0]) == [-2.0, 0.0]


def test_of_equal_logits_the_lower_expert() -> None:
    assert factor([2, 0], [1.5, 0.0, 1.5]) == [0.0, 1.5]


def test_absent_choices_are_no_candidates() -> None:
    assert factor([3, 1], [9.0, 2.0, 4.0]) == [0.0, 2.0]
    assert factor([3, 3], [9.0, 2.0, 4.0]) == [0.0, 0.0]
