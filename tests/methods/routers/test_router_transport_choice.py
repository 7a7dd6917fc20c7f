"""What the router transport_choice promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtura.methods.routers._transport import solved_prices
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


def masses(router: TransportChoice, x: Tensor) -> Tensor:
    """The mass that the plan moves from each token to each expert."""
    return router.transported(x @ router.weight.T, torch.ones(len(x), dtype=torch.bool))[1].detach()


def test_sparse_plan_with_room_for_all_is_the_nearest_plan_by_alternating_projections() -> None:
    router = TransportChoice(SHAPE, capacity_factor=4.0, regularization=0.5, num_iterations=3000).double()
    x = tokens(12).double()
    near = (x @ router.weight.T).softmax(-1).detach() / 0.5
    # Dykstra: onto rows of sum 1 and columns of sum 3 in turns, each with its own correction.
    by_rows, by_columns = torch.zeros_like(near), torch.zeros_like(near)
    for _ in range(2000):
        rows = torch.stack([on_simplex(row, 1.0) for row in near + by_rows])
        by_rows = near + by_rows - rows
        near = torch.stack([on_simplex(column, 3.0) for column in (rows + by_columns).T]).T
        by_columns = rows + by_columns - near
        if (near - rows).abs().max() < 1e-9:
            break
    torch.testing.assert_close(masses(router, x), near, atol=1e-5, rtol=0)


def best_column(worth: list[float], capacity: int, total: float) -> list[float]:
    """What one expert takes, by a plain search for how many of its best tokens have more than nothing."""
    order = sorted(range(len(worth)), key=lambda token: -worth[token])[:capacity]
    for count in range(len(order), 0, -1):
        level = (sum(worth[token] for token in order[:count]) - total) / count
        if worth[order[count - 1]] > level:
            break
    taken = set(order[:count])
    return [value - level if token in taken else 0.0 for token, value in enumerate(worth)]


def dual(similarity: Tensor, prices: Tensor, capacity: int) -> tuple[float, Tensor]:
    """The value of the dual problem and its plan, one expert after another."""
    num_tokens, num_experts = similarity.shape
    worth = (similarity + prices[:, None]).T.tolist()
    columns = [best_column(column, capacity, num_tokens / num_experts) for column in worth]
    plan = torch.tensor(columns, dtype=torch.double).T
    value = (plan * (similarity + prices[:, None]) - plan.square() / 2).sum() - prices.sum()
    return float(value), plan


@pytest.mark.parametrize(("factor", "scale"), [(1.0, 1.0), (2.0, 1.0), (2.0, 4.0), (1.5, 30.0)])
def test_the_dual_problem_is_solved(factor: float, scale: float) -> None:
    x = scale * tokens(16).double()
    router = TransportChoice(SHAPE, capacity_factor=factor).double()
    similarity = (x @ router.weight.T).softmax(-1).detach()
    capacity = math.ceil(factor * 4)
    solved = solved_prices(similarity, capacity, 1.0, router.num_iterations)[:, 0]
    prices, lowest = torch.zeros(16, dtype=torch.double), math.inf
    start, _ = dual(similarity, prices, capacity)
    for step in range(1000):
        value, plan = dual(similarity, prices, capacity)
        lowest = min(lowest, value)
        prices = prices - 1 / (step + 8) * (plan.sum(-1) - 1)
    value, plan = dual(similarity, solved, capacity)
    assert value - lowest < 0.15 * (start - lowest)
    torch.testing.assert_close(masses(router, x), plan)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 4.0, dtype=torch.double))


def test_few_tokens_are_left_out_and_none_has_the_mass_of_many() -> None:
    x = 2 * torch.randn(256, 16, generator=torch.Generator().manual_seed(2))
    router = TransportChoice(LayerShape(d_model=16, d_expert=8, num_experts=8))
    mass = masses(router, x)
    torch.testing.assert_close(mass.sum(0), torch.full((8,), 32.0))
    assert (mass > 0).sum(0).max() <= 64
    assert mass.sum(-1).min() > 0.5
    assert mass.sum(-1).max() < 1.6
    assert mass.sum(-1).std() < 0.15


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_large_logits_have_finite_weights_and_gradients_and_no_empty_expert(scale: float) -> None:
    router = TransportChoice(SHAPE)
    routing = trained(router, scale * tokens(16))
    assert (routing.load > 0).all()
    assert ((routing.weights >= 0) & (routing.weights <= 1)).all()
    routing.weights.sum().backward()
    assert router.weight.grad is not None
    assert torch.isfinite(router.weight.grad).all()


def test_weights_are_softmax_probabilities_or_the_mass() -> None:
    x = tokens()
    for plan in ("sparse", "sinkhorn"):
        router = TransportChoice(SHAPE, plan=plan)
        routing = trained(router, x)
        probabilities = (x @ router.weight.T).softmax(-1)
        torch.testing.assert_close(routing.weights, probabilities[routing.token_ids, routing.expert_ids])
        by_mass = trained(TransportChoice(SHAPE, plan=plan, weigh_by="plan"), x)
        assert torch.equal(by_mass.token_ids, routing.token_ids)
        mass = masses(router, x)
        torch.testing.assert_close(by_mass.weights, mass[routing.token_ids, routing.expert_ids])
        assert by_mass.weights.requires_grad


def test_sinkhorn_experts_take_the_tokens_of_most_mass_by_a_plain_loop() -> None:
    router = TransportChoice(
        SHAPE, plan="sinkhorn", capacity_factor=1.5, regularization=0.5, num_iterations=60
    )
    routing = trained(router, tokens())
    plan = torch.exp((tokens() @ router.weight.T).double().detach() / 0.5)
    for _ in range(60):
        plan = plan / plan.sum(0) * 5
        plan = plan / plan.sum(1, keepdim=True)
    torch.testing.assert_close(masses(router, tokens()).double(), plan, atol=1e-5, rtol=1e-4)
    for expert in range(4):
        best = plan[:, expert].topk(8).indices
        mine = routing.expert_ids == expert
        assert set(routing.token_ids[mine].tolist()) == set(best.tolist())


@pytest.mark.parametrize("plan", ["sinkhorn", "sparse"])
def test_padding_takes_no_mass(plan: str) -> None:
    router = TransportChoice(SHAPE, plan=plan)
    valid = torch.arange(20) % 3 != 1
    taken, mass = router.transported(tokens() @ router.weight.T, valid)
    alone = masses(router, tokens()[valid])
    torch.testing.assert_close(mass[valid].detach(), alone)
    assert (mass[~valid] == 0).all()
    assert not taken[~valid].any()


@pytest.mark.parametrize(("factor", "count"), [(1.0, 1), (1.5, 2), (2.0, 2), (2.5, 3), (3.49, 3)])
def test_a_decoder_at_inference_lets_tokens_choose(factor: float, count: int) -> None:
    router = TransportChoice(SHAPE, capacity_factor=factor)
    routing = router(RouterInput.of(tokens()))
    assert torch.bincount(routing.token_ids).tolist() == [count] * 20
    encoder = router(RouterInput.of(tokens(), causal=False))
    assert torch.equal(encoder.token_ids, trained(router, tokens()).token_ids)
