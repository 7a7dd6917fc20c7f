"""What the balancer switch_loss promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

from mixtura.authoring.contracts import sample_routing
from mixtura.methods.balancers.switch_loss import SwitchLoss
from mixtura.methods.routers.switch import Switch
from mixtura.types import BalancerInput, LayerShape, RouterInput, Routing


def test_equals_the_loss_of_switch_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 6, generator=generator).softmax(-1)
    weights, chosen = scores.max(-1, keepdim=True)
    valid = torch.ones(50, dtype=torch.bool)
    routing = Routing.from_choices(chosen, weights, scores=scores, logits=scores, valid=valid)
    expected = load_balancing_loss_func(scores[None], chosen[None])
    torch.testing.assert_close(SwitchLoss(coefficient=1.0).loss(BalancerInput(routing=routing)), expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_costs_the_coefficient_whatever_top_k(top_k: int) -> None:
    num_tokens, num_experts = 16, 8
    scores = torch.full((num_tokens, num_experts), 1 / num_experts)
    chosen = (torch.arange(num_tokens)[:, None] + torch.arange(top_k)) % num_experts
    valid = torch.ones(num_tokens, dtype=torch.bool)
    weights = scores.gather(1, chosen)
    routing = Routing.from_choices(chosen, weights, scores=scores, logits=scores, valid=valid)
    assert SwitchLoss(coefficient=0.01).loss(BalancerInput(routing=routing)).item() == pytest.approx(0.01)


def test_collapse_costs_the_number_of_experts() -> None:
    scores = torch.eye(8)[:1].expand(10, -1)
    chosen = torch.zeros(10, 1, dtype=torch.long)
    valid = torch.ones(10, dtype=torch.bool)
    routing = Routing.from_choices(chosen, scores[:, :1], scores=scores, logits=scores, valid=valid)
    assert SwitchLoss(coefficient=1.0).loss(BalancerInput(routing=routing)).item() == pytest.approx(8.0)


def test_tokens_without_room_still_count() -> None:
    shape = LayerShape(d_model=16, d_expert=8, num_experts=4)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(20, -1)
    losses = [
        SwitchLoss(coefficient=1.0).loss(
            BalancerInput(routing=Switch(shape, capacity_factor=room)(RouterInput.of(x)))
        )
        for room in (1.0, 100.0)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_two_layers_collapsed_on_different_experts_are_both_penalised() -> None:
    # Pooling both layers' counts would call this balanced: each expert has half of the assignments.
    balancer = SwitchLoss(coefficient=1.0)
    losses = []
    for expert in (0, 1):
        scores = torch.eye(2)[expert].expand(10, -1)
        chosen = torch.full((10, 1), expert)
        valid = torch.ones(10, dtype=torch.bool)
        routing = Routing.from_choices(
            chosen, scores.gather(1, chosen), scores=scores, logits=scores, valid=valid
        )
        losses.append(balancer.loss(BalancerInput(routing=routing)).item())
    assert losses == pytest.approx([2.0, 2.0])


def test_gradient_flows_through_scores_alone() -> None:
    routing = sample_routing(seed=1, hot=1.0)
    (slope,) = torch.autograd.grad(
        SwitchLoss(coefficient=1.0).loss(BalancerInput(routing=routing)), routing.scores
    )
    valid = int(routing.valid.sum())
    expected = 8 * routing.load / routing.load.sum() / valid
    torch.testing.assert_close(slope[0], expected)
    assert (slope[~routing.valid] == 0).all()
