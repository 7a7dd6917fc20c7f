"""Linear layers in nested codes: at every width their decoded selves, by the compiled kernels and without."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_layouts import norm_error
from torch import nn

from mixtura.errors import SettingError
from mixtura.kernels import NestedLinear, nest_linears, using
from mixtura.methods.quantizers import Encoded
from mixtura.methods.quantizers.nested import Nested

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def two_layers(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": nn.Linear(96, 40), "two": nn.Linear(96, 40, bias=False)}).to(dtype)


@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_nested_layer_is_its_decoded_self_at_every_width(name: str, dtype: torch.dtype) -> None:
    model = two_layers(dtype)
    weight, bias = model[name].weight.detach(), model[name].bias
    assert nest_linears(model, group_size=32, wanted=lambda found: found == name) == 1
    nested = model[name]
    assert isinstance(nested, NestedLinear)
    encoded = Nested(group_size=32).encode(weight)
    lost, read = [], []
    for bits in (8, 4, 2):
        nested.bits = bits
        own = Encoded({part: encoded.tensors[part] for part in Nested().widths[bits]}, encoded.meta)
        decoded = Nested(group_size=32).decode(own, torch.float64)
        for rows in (1, 5, 900):
            x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
            expected = x.double() @ decoded.T + (0 if bias is None else bias.double())
            for mode in ("fast", "exact", "torch"):
                with using(mode):
                    assert norm_error(nested(x), expected) < ERRORS[dtype]
        lost.append(float((decoded - weight.double()).norm()))
        matrix = nested.matrix()
        read.append(0 if matrix is None else matrix.num_bytes)
    assert lost == sorted(lost)
    assert read == sorted(read, reverse=True)


def test_it_is_kept_copied_and_differentiated_like_others() -> None:
    model = two_layers(torch.float32)
    assert nest_linears(model) == 2
    nested = model["one"]
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    restored = copy.deepcopy(nested)
    restored.load_state_dict(nested.state_dict())
    assert torch.equal(restored(x), nested(x))
    y = x.clone().requires_grad_()
    nested(y).sum().backward()
    assert y.grad is not None
    assert "bits=8" in repr(nested)
    with pytest.raises(SettingError, match="must be 8, 4 or 2, got 3"):
        nested.bits = 3
    with pytest.raises(SettingError):
        nest_linears(two_layers(torch.float32), group_size=0)
