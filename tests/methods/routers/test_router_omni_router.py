"""What the router omni_router promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.routers.omni_router import OmniRouter
from mixtura.methods.routers.switch import Switch
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens() -> torch.Tensor:
    return torch.randn(30, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_is_the_switch_router_without_a_limit() -> None:
    ours, theirs = OmniRouter(SHAPE), Switch(SHAPE, capacity_factor=4.0)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    ours_routing, expected = ours(RouterInput.of(tokens())), theirs(RouterInput.of(tokens()))
    assert torch.equal(ours_routing.expert_ids, expected.expert_ids)
    assert torch.equal(ours_routing.token_ids, expected.token_ids)
    torch.testing.assert_close(ours_routing.weights, expected.weights)


def test_every_layer_trains_and_uses_the_same_rows() -> None:
    router = OmniRouter(SHAPE)
    layers = torch.nn.ModuleList(MoELayer(router, Experts(SHAPE, seed=seed)) for seed in range(3))
    assert sum(p.shape == (4, 16) for p in layers.parameters()) == 1
    slopes = []
    for number, layer in enumerate(layers):
        output, _ = layer(RouterInput.of(tokens(), layer=number))
        slopes.append(torch.autograd.grad(output.sum(), router.weight)[0])
    router.weight.grad = None
    sum(layer(RouterInput.of(tokens(), layer=n))[0].sum() for n, layer in enumerate(layers)).backward()
    torch.testing.assert_close(router.weight.grad, sum(slopes))
    assert all(slope.abs().sum() > 0 for slope in slopes)


def test_layers_agree_on_tokens_that_change_little() -> None:
    router = OmniRouter(SHAPE)
    near = tokens() + 0.01 * tokens().flip(0)
    here, there = (router(RouterInput.of(x)).scores.argmax(-1) for x in (tokens(), near))
    assert (here == there).float().mean() > 0.9
