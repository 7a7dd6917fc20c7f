"""What the router moe_x promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.routers.moe_x import MoeX
from mixtura.modeling.layer import ExpertMatrices, Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=64, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(0))


def relu_experts(num_neurons: int = 64) -> ExpertMatrices:
    """Ungated experts whose neurons lean to one side, another one for each expert."""
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(6, num_neurons, 16, generator=generator) + 0.5 * torch.randn(
        6, 1, 16, generator=generator
    )
    return ExpertMatrices(up, torch.zeros(6, 16, num_neurons), activation=F.relu, gated=False)


def test_logits_follow_from_each_dimensions_mean_and_variance_over_neurons() -> None:
    experts = relu_experts()
    logits = MoeX(SHAPE)(RouterInput.of(tokens(), experts=experts)).logits
    for token in range(5):
        for expert in range(6):
            mean = variance = 0.0
            for dimension in range(16):
                column = experts.up[expert, :, dimension]
                average = sum(column.tolist()) / 64
                value = tokens()[token, dimension].item()
                mean += average * value
                variance += sum((w - average) ** 2 for w in column.tolist()) / 64 * value**2
            expected = -math.erf(mean / math.sqrt(2 * variance))
            assert logits[token, expert].item() == pytest.approx(expected, abs=1e-5)


def test_the_chosen_experts_are_the_sparsest() -> None:
    experts = relu_experts(512)
    shape = LayerShape(d_model=16, d_expert=512, num_experts=6)
    routing = MoeX(shape, top_k=1)(RouterInput.of(tokens(), experts=experts))
    firing = (torch.einsum("efd,td->tef", experts.up, tokens()) > 0).double().mean(-1)
    # -erf of a normal variable's standardised mean is 1 - 2 * P(positive).
    assert torch.corrcoef(torch.stack([routing.logits.flatten(), (1 - 2 * firing).flatten()]))[0, 1] > 0.95
    chosen = firing[routing.token_ids, routing.expert_ids].mean()
    assert chosen < firing.mean() - 0.1


def test_weights_are_a_softmax_over_the_chosen_logits() -> None:
    routing = MoeX(SHAPE, top_k=2)(RouterInput.of(tokens(), experts=relu_experts()))
    for token in range(20):
        mine = routing.token_ids == token
        best = routing.logits[token].topk(2)
        expected = torch.zeros(6).scatter(0, best.indices, best.values.softmax(-1))
        torch.testing.assert_close(routing.weights[mine], expected[routing.expert_ids[mine]])


def test_gated_experts_are_judged_by_their_gates() -> None:
    experts = Experts(SHAPE).matrices
    assert experts.gate is not None
    ungated = ExpertMatrices(experts.gate, experts.down, activation=F.relu, gated=False)
    one, other = (MoeX(SHAPE)(RouterInput.of(tokens(), experts=held)) for held in (experts, ungated))
    assert torch.equal(one.logits, other.logits)


def test_the_routing_trains_the_experts() -> None:
    experts = Experts(SHAPE)
    MoeX(SHAPE)(RouterInput.of(tokens(), experts=experts.matrices)).weights.square().sum().backward()
    assert experts.gate_up_proj.grad is not None
    assert experts.gate_up_proj.grad[:, :64].abs().sum() > 0


def test_experts_of_another_number_are_refused() -> None:
    other = Experts(LayerShape(d_model=16, d_expert=64, num_experts=5)).matrices
    with pytest.raises(UserError, match="made for 6 experts, got 5"):
        MoeX(SHAPE)(RouterInput.of(tokens(), experts=other))
