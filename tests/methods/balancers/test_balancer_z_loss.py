"""What the balancer z_loss promises beyond its kind's contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from mixtura.authoring.contracts import sample_routing
from mixtura.methods.balancers.z_loss import ZLoss
from mixtura.types import BalancerInput


def test_equals_the_loss_of_switch_transformers() -> None:
    routing = sample_routing(seed=3)
    routing = replace(routing, valid=torch.ones_like(routing.valid))
    expected = router_z_loss_func(routing.logits[None])
    torch.testing.assert_close(ZLoss(coefficient=1.0).loss(BalancerInput(routing=routing)), expected)


def test_is_the_mean_over_valid_tokens_by_hand() -> None:
    routing = sample_routing(seed=4, num_tokens=16)
    rows = routing.logits[routing.valid].tolist()
    by_hand = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in rows) / len(rows)
    made = ZLoss(coefficient=0.5).loss(BalancerInput(routing=routing)).item()
    assert made == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_a_step_against_the_gradient_makes_logits_smaller() -> None:
    routing = sample_routing(seed=5)
    large = (10 * routing.logits.detach()).requires_grad_()
    loss = ZLoss(coefficient=1.0).loss(BalancerInput(routing=replace(routing, logits=large)))
    (slope,) = torch.autograd.grad(loss, large)
    assert (large - 0.5 * slope)[routing.valid].logsumexp(-1).abs().mean() < large.logsumexp(-1).abs().mean()


def test_bfloat16_logits_are_summed_exactly() -> None:
    routing = sample_routing(seed=6)
    half = replace(routing, logits=routing.logits.bfloat16())
    as_float = replace(routing, logits=half.logits.float())
    losses = [ZLoss(coefficient=1.0).loss(BalancerInput(routing=r)).item() for r in (half, as_float)]
    assert losses[0] == losses[1]
