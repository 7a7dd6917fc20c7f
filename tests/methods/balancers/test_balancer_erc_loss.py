"""What the balancer erc_loss promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.authoring.contracts import sample_routing
from mixtura.errors import UserError
from mixtura.methods.balancers.erc_loss import ErcLoss
from mixtura.modeling.layer import ExpertMatrices
from mixtura.types import BalancerInput


def _inputs(rows: Tensor, gate: Tensor, seed: int | None = None) -> BalancerInput:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    experts = ExpertMatrices(torch.cat([gate, torch.zeros_like(gate)], dim=1), gate.transpose(1, 2))
    return BalancerInput(routing=sample_routing(), experts=experts, router_weight=rows, generator=generator)


def _made(num_experts: int = 4, d_model: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_experts, d_model, generator=generator)
    return rows, torch.randn(num_experts, 5, d_model, generator=generator)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_equals_the_papers_sum_in_a_plain_loop(alpha: float) -> None:
    rows, gate = _made()
    strength = [[float((gate[j] @ rows[i]).norm()) for j in range(4)] for i in range(4)]
    total = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                total += max(strength[i][j] - alpha * strength[i][i], 0.0)
                total += max(strength[j][i] - alpha * strength[i][i], 0.0)
    made = ErcLoss(alpha=alpha, coefficient=0.1).loss(_inputs(rows, gate)).item()
    assert made == pytest.approx(0.1 * total / 16, rel=1e-5)


def test_noise_stays_within_half_the_way_to_the_nearest_row() -> None:
    rows, _ = _made(num_experts=5)
    nearest = torch.cdist(rows, rows).fill_diagonal_(torch.inf).min(-1).values
    moved = []
    for seed in range(50):
        made = ErcLoss._perturbed(rows, torch.Generator().manual_seed(seed))
        moved.append((made - rows).norm(dim=-1))
        assert (torch.cdist(made, rows).argmin(-1) == torch.arange(5)).all()
    distance = torch.stack(moved)
    assert (distance <= nearest / 2 + 1e-6).all()
    assert (distance > 0.1 * nearest).any()


def test_training_on_it_couples_rows_and_experts() -> None:
    rows, gate = (value.requires_grad_() for value in _made())
    losses = []
    for step in range(200):
        loss = ErcLoss().loss(_inputs(rows, gate, seed=step))
        losses.append(loss.item())
        slopes = torch.autograd.grad(loss, (rows, gate))
        with torch.no_grad():
            for value, slope in zip((rows, gate), slopes, strict=True):
                value -= 0.05 * slope
    strength = torch.einsum("efd,id->ief", gate, rows).norm(dim=-1)
    assert losses[-1] < 0.1 * losses[0]
    assert (strength.argmax(0) == torch.arange(4)).all()
    assert (strength.argmax(1) == torch.arange(4)).all()


def test_experts_without_a_gate_answer_with_their_up_matrices() -> None:
    rows, up = _made()
    experts = ExpertMatrices(up, up.transpose(1, 2), activation=torch.relu, gated=False)
    inputs = BalancerInput(routing=sample_routing(), experts=experts, router_weight=rows)
    torch.testing.assert_close(ErcLoss().loss(inputs), ErcLoss().loss(_inputs(rows, up)))


def test_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="ErcLoss cannot balance without experts"):
        ErcLoss().loss(BalancerInput(routing=sample_routing()))


def test_a_row_of_zeros_is_left_where_it_is() -> None:
    rows, gate = _made()
    rows = torch.cat([10 * rows[:3], torch.zeros(1, 6)]).requires_grad_()
    loss = ErcLoss().loss(_inputs(rows, gate, seed=0))
    (slope,) = torch.autograd.grad(loss, rows)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()
