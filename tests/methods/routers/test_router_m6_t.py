"""What the router m6_t promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.m6_t import M6T
from mixtura.methods.routers.top_k import TopK
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(30, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_is_the_sum_of_top_1_layers() -> None:
    router, experts = M6T(SHAPE, num_prototypes=3), Experts(SHAPE)
    output, routing = MoELayer(router, experts)(RouterInput.of(tokens()))
    expected = torch.zeros_like(output)
    small = LayerShape(d_model=16, d_expert=8, num_experts=2)
    for prototype in range(3):
        rows = slice(2 * prototype, 2 * prototype + 2)
        alone, own = TopK(small, top_k=1, renormalize=False), Experts(small)
        with torch.no_grad():
            alone.weight.copy_(router.weight[rows])
            own.gate_up_proj.copy_(experts.gate_up_proj[rows])
            own.down_proj.copy_(experts.down_proj[rows])
        expected = expected + MoELayer(alone, own)(RouterInput.of(tokens()))[0]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(30))


def test_prototypes_do_not_compete() -> None:
    router = M6T(SHAPE, num_prototypes=2)
    before = router(RouterInput.of(tokens()))
    with torch.no_grad():
        router.weight[:3] *= 10
    after = router(RouterInput.of(tokens()))
    second = before.expert_ids >= 3
    assert torch.equal(before.weights[second], after.weights[after.expert_ids >= 3])
    assert torch.equal(before.token_ids[second], after.token_ids[after.expert_ids >= 3])
    assert not torch.equal(before.weights[~second], after.weights[after.expert_ids < 3])


def test_prototypes_of_unequal_sizes_are_refused() -> None:
    with pytest.raises(SettingError, match="must divide the 6 experts"):
        M6T(SHAPE, num_prototypes=4)
