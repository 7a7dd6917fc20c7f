"""What the balancer re_moe_l1 promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.balancers.re_moe_l1 import ReMoeL1
from mixtura.methods.routers.re_moe import ReMoe
from mixtura.types import BalancerInput, LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=5)


def routed(count: int = 20) -> Routing:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    return ReMoe(SHAPE)(RouterInput.of(x))


def test_loss_by_a_plain_loop() -> None:
    routing = routed()
    balancer = ReMoeL1(top_k=2, initial=0.5)
    found = balancer.loss(BalancerInput(routing=routing, state=balancer.start(SHAPE)))
    weights = routing.scores.tolist()
    expected = 0.0
    for expert in range(5):
        total = sum(weights[token][expert] for token in range(20))
        active = sum(weights[token][expert] > 0 for token in range(20))
        expected += 0.5 * 5 / (20**2 * 2) * total * active
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_busier_experts_are_pushed_harder() -> None:
    routing = routed()
    balancer = ReMoeL1(initial=1.0)
    loss = balancer.loss(BalancerInput(routing=routing, state=balancer.start(SHAPE)))
    (slope,) = torch.autograd.grad(loss, routing.scores)
    assert routing.load.max() > routing.load.min()
    torch.testing.assert_close(slope[0], 5 * routing.load / (20 * 2 * 20))


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1.5), (5, 1 / 1.5)])
def test_lambda_rises_while_too_many_are_active_and_falls_otherwise(top_k: int, expected: float) -> None:
    balancer = ReMoeL1(top_k=top_k, initial=1.0, factor=1.5)
    state = balancer.update(BalancerInput(routing=routed(), state=balancer.start(SHAPE)))
    assert state["coefficient"].item() == pytest.approx(expected)


def test_all_layers_together_decide_for_each() -> None:
    balancer = ReMoeL1(top_k=2, initial=1.0, factor=2.0)
    begun = balancer.start(SHAPE)
    routing = routed()
    busy, idle = torch.full((5,), 20), torch.zeros(5, dtype=torch.long)
    for loads, expected in (([busy, idle, idle], 0.5), ([busy, busy, idle], 2.0)):
        state = balancer.update(
            BalancerInput(routing=routing, load=busy, loads=torch.stack(loads), num_tokens=20, state=begun)
        )
        assert state["coefficient"].item() == expected


def test_a_step_without_tokens_leaves_lambda() -> None:
    balancer = ReMoeL1(initial=0.25)
    state = balancer.update(BalancerInput(routing=routed(0), state=balancer.start(SHAPE)))
    assert state["coefficient"].item() == 0.25


@pytest.mark.parametrize(("top_k", "bound"), [(1, 0.5), (60, 1e-30)])
def test_lambda_stays_within_its_bounds_however_long_the_target_is_missed(top_k: int, bound: float) -> None:
    balancer = ReMoeL1(top_k=top_k, most=0.5, factor=1.5)
    state, routing = balancer.start(SHAPE), routed()
    for _ in range(400):
        state = balancer.update(BalancerInput(routing=routing, state=state))
    assert state["coefficient"].item() == pytest.approx(bound)
