"""Packing the linear layers of whole models: which are left alone, and that nothing broken is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura import balance, open_model
from mixtura.errors import UnsupportedModelError
from mixtura.kernels import NestedLinear, PackedLinear, nest_linears, pack_linears

PACK = [lambda model: pack_linears(model, bits=8), nest_linears]


@pytest.mark.parametrize("pack", PACK, ids=["packed", "nested"])
@pytest.mark.parametrize("family", ["jamba", "gemma4", "zaya"])
def test_routers_and_layers_whose_weight_is_read_are_left_alone(family: str, pack: Any) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    assert pack(model) > 0
    inputs = tiny_inputs(model)
    with torch.no_grad():
        found, expected = model(**inputs).logits, plain(**inputs).logits
    # 8 bits a weight: near the plain model, far from what a broken layer would give. A token whose choice of
    # experts was nearly even may change it.
    off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.median() < 0.1
    assert (off < 0.3).float().mean() > 0.9
    for layer, own in zip(open_model(model).layers, open_model(plain).layers, strict=True):
        assert torch.equal(layer.router_weight(), own.router_weight())
    balance(model, "switch_loss")


class Reader(nn.Module):
    """Multiplies by the weight of one layer, and calls the other; the third is in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)
        self.listed = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight) + F.linear(x, self.listed[0].weight)


@pytest.mark.parametrize(("pack", "kind"), [(PACK[0], PackedLinear), (PACK[1], NestedLinear)])
def test_a_packed_weight_can_be_read(pack: Any, kind: type) -> None:
    torch.manual_seed(0)
    module, x = Reader(), torch.randn(3, 16)
    expected, own = module(x), module.listed[0].weight.detach().clone()
    assert pack(module) == 2
    assert type(module.read) is nn.Linear
    assert isinstance(module.called, kind)
    assert (module.listed[0].weight - own).abs().max() < 0.02 * own.abs().max()
    assert torch.allclose(module(x), expected, atol=0.05)
    assert module.to(torch.bfloat16).listed[0].weight.dtype == torch.bfloat16
    assert "listed.0.like" not in module.state_dict()


@pytest.mark.parametrize("pack", PACK, ids=["packed", "nested"])
def test_a_model_with_packed_layers_is_not_saved(pack: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    assert pack(model.model) > 0
    with pytest.raises(UnsupportedModelError, match="linear layers in fewer bits cannot be saved"):
        model.model.save_pretrained(tmp_path / "out")
    pack(model)
    with pytest.raises(UnsupportedModelError, match="linear layers in fewer bits cannot be saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_router_without_a_matrix_is_named() -> None:
    model = tiny_model("gemma4")
    (block,) = [m for name, m in model.named_modules() if name.endswith("layers.0") and hasattr(m, "router")]
    block.router.proj = PackedLinear.of(block.router.proj, bits=8)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.router holds no matrix"):
        _ = open_model(model).layers
