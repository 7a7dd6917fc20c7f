"""What the router re_moe promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.balancers.re_moe_l1 import ReMoeL1
from mixtura.methods.routers.re_moe import ReMoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import BalancerInput, LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_weights_are_the_positive_logits() -> None:
    router = ReMoe(SHAPE)
    routing = router(RouterInput.of(tokens()))
    found = torch.zeros(40, 6)
    found[routing.token_ids, routing.expert_ids] = routing.weights.detach()
    torch.testing.assert_close(found, (tokens() @ router.weight.T).clamp(min=0).detach())
    assert (routing.weights > 0).all()


def test_the_output_is_continuous_where_an_expert_comes_in() -> None:
    layer = MoELayer(ReMoe(SHAPE), Experts(SHAPE)).double()
    row = layer.router.weight[0].detach()
    x = tokens(1).double()
    x = x - (x @ row) / (row @ row) * row
    outputs, counts = [], []
    for side in (-1e-9, 1e-9):
        output, routing = layer(RouterInput.of(x + side * row))
        outputs.append(output)
        counts.append(routing.load[0].item())
    assert counts == [0, 1]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-7


def test_with_its_balancer_it_finds_the_sparsity_asked_for() -> None:
    router, balancer = ReMoe(SHAPE), ReMoeL1(top_k=2, initial=1e-3, factor=1.05)
    state = balancer.start(SHAPE)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    # A direction that all tokens share, without which no row is negative for most of them.
    x = tokens(200) + 1
    target = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).relu()
    active = []
    for _ in range(600):
        routing = router(RouterInput.of(x))
        inputs = BalancerInput(routing=routing, state=state)
        # Something to keep weights alive, as a task's loss does.
        loss = (routing.scores - target).square().mean() + balancer.loss(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = balancer.update(inputs)
        active.append(routing.load.sum().item() / 200)
    assert abs(sum(active[-100:]) / 100 - 2) < 0.1
    assert abs(active[0] - 2) > 0.5
