"""What the balancer entropy promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.balancers.entropy import Entropy
from mixtura.types import BalancerInput, Routing


def routing(logits: torch.Tensor, valid: torch.Tensor | None = None) -> Routing:
    chosen = logits.argmax(-1, keepdim=True)
    valid = torch.ones(logits.shape[0], dtype=torch.bool) if valid is None else valid
    return Routing.from_choices(
        chosen, logits.gather(1, chosen), scores=logits.sigmoid(), logits=logits, valid=valid
    )


def test_mean_of_each_tokens_sum_of_p_log_p() -> None:
    logits = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(
        Entropy(coefficient=0.5).loss(BalancerInput(routing=routing(logits))), 0.5 * expected
    )


def test_certainty_costs_nothing_and_indecision_the_logarithm_of_the_experts() -> None:
    sure = 1000 * torch.eye(4)
    assert Entropy(coefficient=1.0).loss(BalancerInput(routing=routing(sure))).item() == 0
    unsure = torch.zeros(3, 8)
    assert Entropy(coefficient=1.0).loss(BalancerInput(routing=routing(unsure))).item() == pytest.approx(
        math.log(8)
    )


def test_a_gradient_step_makes_the_router_surer_or_less_sure_by_sign() -> None:
    start = torch.tensor([[1.0, 0.0, -0.5]], requires_grad=True)
    for coefficient, grows in ((1.0, True), (-1.0, False)):
        loss = Entropy(coefficient=coefficient).loss(BalancerInput(routing=routing(start)))
        (slope,) = torch.autograd.grad(loss, start)
        after = (start - 0.1 * slope).softmax(-1).max()
        assert (after > start.softmax(-1).max()) == grows


@pytest.mark.parametrize("gap", [87.0, 104.0, 1e4, 1e30, math.inf])
def test_the_gradient_of_certainty_is_finite_and_moves_nothing(gap: float) -> None:
    logits = torch.tensor([[0.0, -gap, -gap], [0.5, 0.0, -0.5]], requires_grad=True)
    loss = Entropy(coefficient=1.0).loss(BalancerInput(routing=routing(logits)))
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope[0].tolist() == pytest.approx([0.0] * 3, abs=1e-30)
    probabilities = torch.tensor([0.5, 0.0, -0.5]).double().softmax(-1)
    mean = (probabilities * probabilities.log()).sum()
    torch.testing.assert_close(slope[1].double(), -probabilities * (probabilities.log() - mean) / 2)


def test_padding_has_no_part_even_if_it_is_not_finite() -> None:
    logits = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]], requires_grad=True)
    padded = routing(logits, torch.tensor([True, False]))
    alone = routing(logits[:1])
    torch.testing.assert_close(
        Entropy().loss(BalancerInput(routing=padded)), Entropy().loss(BalancerInput(routing=alone))
    )
    (slope,) = torch.autograd.grad(Entropy().loss(BalancerInput(routing=padded)), logits)
    assert slope[1].tolist() == [0.0, 0.0]
