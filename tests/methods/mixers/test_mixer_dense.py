"""What the mixer dense promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.mixers.dense import Dense
from mixtura.methods.routers.top_k import TopK
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def tokens() -> torch.Tensor:
    return torch.randn(12, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_equals_top_k_of_all_experts() -> None:
    mixer, router, experts = Dense(SHAPE), TopK(SHAPE, top_k=4), Experts(SHAPE)
    with torch.no_grad():
        router.weight.copy_(mixer.weight)
    mixed, routing = MoELayer(mixer, experts)(RouterInput.of(tokens()))
    expected, routed = MoELayer(router, experts)(RouterInput.of(tokens()))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(routing.scores, routed.scores)


def test_every_expert_learns_from_every_token() -> None:
    mixer, experts = Dense(SHAPE), Experts(SHAPE)
    for token in range(12):
        output, _ = mixer(RouterInput.of(tokens()[token : token + 1]), experts.matrices)
        (slope,) = torch.autograd.grad(output.sum(), experts.down_proj)
        assert (slope.flatten(1).abs().sum(-1) > 0).all()


def test_temperature_sharpens_and_flattens() -> None:
    matrices = Experts(SHAPE).matrices
    sharp, flat = (Dense(SHAPE, temperature=t)(RouterInput.of(tokens()), matrices)[1] for t in (1e-3, 1e3))
    assert (sharp.scores.max(-1).values > 0.99).float().mean() > 0.9
    torch.testing.assert_close(flat.scores, torch.full((12, 4), 0.25), atol=2e-3, rtol=0)
