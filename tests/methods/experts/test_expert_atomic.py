"""What the experts atomic promise beyond their kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.experts.atomic import Atomic
from mixtura.methods.routers.product_key import ProductKey
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=1, num_experts=100)


def test_equals_the_authors_sum_over_table_entries() -> None:
    router, bank = ProductKey(SHAPE, top_k=5), Atomic(SHAPE)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    output, routing = MoELayer(router, Experts(bank))(RouterInput.of(x))
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_ids, routing.expert_ids, routing.weights, strict=True):
        read, write = bank.gate_up_proj[expert, 0], bank.down_proj[expert, :, 0]
        expected[token] += weight * F.silu(read @ x[token]) * write
    torch.testing.assert_close(output, expected)


def test_many_experts_cost_what_is_chosen() -> None:
    shape = LayerShape(d_model=8, d_expert=1, num_experts=250_000)
    layer = MoELayer(ProductKey(shape, top_k=4), Experts(Atomic(shape)))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output, routing = layer(RouterInput.of(x))
    assert routing.scores.shape == (3, 1000)
    assert routing.expert_ids.numel() == 12
    output.sum().backward()
    assert (layer.experts.gate_up_proj.grad.flatten(1).abs().sum(1) > 0).sum() <= 12


def test_wider_experts_are_refused() -> None:
    with pytest.raises(SettingError, match="d_expert must be 1"):
        Atomic(LayerShape(d_model=8, d_expert=2, num_experts=4))
