"""What the router autonomy_of_experts promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.autonomy_of_experts import AutonomyOfExperts
from mixtura.modeling.layer import ExpertMatrices, Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=6, d_expert=4, num_experts=5)


def tokens(count: int = 12) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_experts_of_the_largest_activations_are_chosen() -> None:
    experts = Experts(SHAPE, seed=1)
    x = tokens()
    routing = AutonomyOfExperts(SHAPE, top_k=2)(RouterInput.of(x, experts=experts.matrices))
    norms = torch.stack([(x @ experts.gate_up_proj[e, :4].T).norm(dim=-1) for e in range(5)], -1)
    torch.testing.assert_close(routing.logits, norms)
    for token in range(12):
        best = norms[token].topk(2)
        mine = routing.token_ids == token
        expected = torch.zeros(5).scatter(0, best.indices, best.values.softmax(-1))
        assert sorted(routing.expert_ids[mine].tolist()) == sorted(best.indices.tolist())
        torch.testing.assert_close(routing.weights[mine], expected[routing.expert_ids[mine]])


def test_an_expert_learns_to_be_chosen() -> None:
    experts = Experts(SHAPE, seed=1)
    routing = AutonomyOfExperts(SHAPE)(RouterInput.of(tokens(), experts=experts.matrices))
    (slope,) = torch.autograd.grad(routing.scores[:, 3].sum(), experts.gate_up_proj)
    assert slope[:, :4].abs().sum() > 0
    assert slope[:, 4:].abs().sum() == 0


def test_experts_without_a_gate_are_ranked_by_their_first_matrix() -> None:
    up, down = torch.eye(6).expand(5, 6, 6) * torch.arange(1.0, 6)[:, None, None], torch.zeros(5, 6, 6)
    experts = ExpertMatrices(up, down, activation=torch.relu, gated=False)
    routing = AutonomyOfExperts(SHAPE, top_k=1)(RouterInput.of(tokens(), experts=experts))
    assert (routing.expert_ids == 4).all()


def test_missing_and_foreign_experts() -> None:
    with pytest.raises(UserError, match="cannot route without experts"):
        AutonomyOfExperts(SHAPE)(RouterInput.of(tokens()))
    other = Experts(LayerShape(6, 4, 3)).matrices
    with pytest.raises(UserError, match="made for 5 experts, got 3"):
        AutonomyOfExperts(SHAPE)(RouterInput.of(tokens(), experts=other))
