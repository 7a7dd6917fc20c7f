"""What the router transport_choice promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtura.methods.routers.transport_choice import TransportChoice
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0)) + 0.5


def trained(router: TransportChoice, x: Tensor) -> Routing:
    return router(RouterInput.of(x, training=True))


def on_simplex(values: Tensor, total: float) -> Tensor:
    """The nearest point with non-negative entries of this sum, by bisection."""
    low, high = values.min() - total, values.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp(min=0).sum() > total else (low, middle)
    return (values - high).clamp(min=0)


def test_sparse_plan_with_room_for_all_is_the_nearest_plan_by_alternating_projections() -> None:
    router = TransportChoice(SHAPE, capacity_factor=4.0, regularization=0.5, num_iterations=3000).double()
    x = tokens(12).double()
    found = trained(router, x).scores.detach()
    near = (x @ router.weight.T).detach() / 0.5
    # Dykstra: onto rows of sum 1 and columns of sum 3 in turns, each with its own correction.
    by_rows, by_columns = torch.zeros_like(near), torch.zeros_like(near)
    for _ in range(2000):
        rows = torch.stack([on_simplex(row, 1.0) for row in near + by_rows])
        by_rows = near + by_rows - rows
        near = torch.stack([on_simplex(column, 3.0) for column in (rows + by_columns).T]).T
        by_columns = rows + by_columns - near
        if (near - rows).abs().max() < 1e-9:
            break
    torch.testing.assert_close(found, near, atol=1e-5, rtol=0)


def test_sparse_plan_keeps_capacity_and_share_exactly_and_tokens_nearly() -> None:
    for factor in (1.0, 1.5, 2.0):
        routing = trained(TransportChoice(SHAPE, capacity_factor=factor, num_iterations=200), tokens())
        assert routing.load.max() <= math.ceil(factor * 5)
        torch.testing.assert_close(routing.scores.sum(0), torch.full((4,), 5.0))
    assert (routing.scores.sum(-1) - 1).abs().max() < 0.2


def test_prices_even_out_what_tokens_get() -> None:
    spreads = []
    for steps in (1, 50):
        routing = trained(TransportChoice(SHAPE, num_iterations=steps), tokens(200))
        spreads.append(routing.scores.sum(-1).std().item())
    assert spreads[1] < 0.3 * spreads[0]


def test_sinkhorn_experts_take_the_tokens_of_most_mass_by_a_plain_loop() -> None:
    router = TransportChoice(
        SHAPE, plan="sinkhorn", capacity_factor=1.5, regularization=0.5, num_iterations=60
    )
    routing = trained(router, tokens())
    plan = torch.exp((tokens() @ router.weight.T).double().detach() / 0.5)
    for _ in range(60):
        plan = plan / plan.sum(0) * 5
        plan = plan / plan.sum(1, keepdim=True)
    torch.testing.assert_close(routing.scores.double(), plan, atol=1e-5, rtol=1e-4)
    for expert in range(4):
        best = plan[:, expert].topk(8).indices
        mine = routing.expert_ids == expert
        assert set(routing.token_ids[mine].tolist()) == set(best.tolist())
        torch.testing.assert_close(routing.weights[mine], routing.scores[routing.token_ids[mine], expert])


@pytest.mark.parametrize("plan", ["sinkhorn", "sparse"])
def test_padding_takes_no_mass(plan: str) -> None:
    router = TransportChoice(SHAPE, plan=plan)
    valid = torch.arange(20) % 3 != 1
    padded = router(RouterInput(x=tokens(), valid=valid, training=True))
    alone = trained(router, tokens()[valid])
    torch.testing.assert_close(padded.scores[valid], alone.scores)
    assert (padded.scores[~valid] == 0).all()


def test_a_decoder_at_inference_lets_tokens_choose() -> None:
    router = TransportChoice(SHAPE, capacity_factor=2.0)
    routing = router(RouterInput.of(tokens()))
    assert torch.bincount(routing.token_ids).tolist() == [2] * 20
    encoder = router(RouterInput.of(tokens(), causal=False))
    assert torch.equal(encoder.token_ids, trained(router, tokens()).token_ids)
