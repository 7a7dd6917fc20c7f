"""The auction that gives all experts equally many tokens."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.routers._assignment import balanced


def greatest(scores: torch.Tensor) -> float:
    """The best total of all assignments with at most T / E tokens an expert, rounded up, by trying them."""
    num_tokens, num_experts = scores.shape

    def rest(token: int, free: tuple[int, ...]) -> float:
        if token == num_tokens:
            return 0.0
        return max(
            scores[token, e].item() + rest(token + 1, (*free[:e], free[e] - 1, *free[e + 1 :]))
            for e in range(num_experts)
            if free[e]
        )

    return rest(0, (math.ceil(num_tokens / num_experts),) * num_experts)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(6, 2), (6, 3), (7, 3), (5, 4), (3, 5), (8, 2)])
def test_finds_the_greatest_total(num_tokens: int, num_experts: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(num_tokens, num_experts, generator=generator)
        scores[:, 0] += 2
        owner = balanced(scores, tolerance=1e-5)
        total = scores.gather(1, owner[:, None]).sum().item()
        assert total >= greatest(scores) - 1e-3
        assert owner.bincount(minlength=num_experts).max() <= math.ceil(num_tokens / num_experts)


def test_is_better_than_taking_turns_by_score_and_within_the_tolerance() -> None:
    # Greedy gives token 0 its best expert and loses 9 on token 1.
    scores = torch.tensor([[10.0, 9.0], [10.0, 0.0]])
    assert balanced(scores).tolist() == [1, 0]


def test_equal_tokens_are_spread() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(400, 4)
    assert balanced(scores).bincount().tolist() == [100, 100, 100, 100]
    assert balanced(torch.zeros(9, 3)).bincount().tolist() == [3, 3, 3]


def test_odd_inputs() -> None:
    assert balanced(torch.zeros(0, 4)).shape == (0,)
    assert balanced(torch.randn(5, 1, generator=torch.Generator().manual_seed(0))).tolist() == [0] * 5
    scores = torch.tensor([[math.nan, 1.0], [2.0, math.inf], [0.5, -math.inf], [0.0, 3.0]])
    assert balanced(scores).bincount().tolist() == [2, 2]
