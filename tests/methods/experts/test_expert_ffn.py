"""What the experts ffn promise beyond their kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods import create
from mixtura.methods.experts.ffn import Ffn
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, Routing

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def tokens() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_equals_linear_layers(activation: str, bias: bool, gated: bool) -> None:
    bank = create("experts", "ffn", SHAPE, activation=activation, gated=gated, bias=bias)
    if bias:
        with torch.no_grad():
            bank.up_bias.normal_(generator=torch.Generator().manual_seed(1))
            bank.down_bias.normal_(generator=torch.Generator().manual_seed(2))
    curve = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation]
    x, ids = tokens(), torch.tensor([2] * 5)
    found = Experts(bank).matrices.run(x, torch.arange(5), ids)
    features = F.linear(x, bank.gate_up_proj[2], bank.up_bias[2] if bias else None)
    hidden = curve(features[:, :6]) * features[:, 6:] if gated else curve(features)
    expected = F.linear(hidden, bank.down_proj[2], bank.down_bias[2] if bias else None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("settings", "count"), [
    ({}, 3 * 4 * 6 * 8),
    ({"gated": False}, 2 * 4 * 6 * 8),
    ({"gated": False, "bias": True}, 2 * 4 * 6 * 8 + 4 * (6 + 8)),
    ({"bias": True}, 3 * 4 * 6 * 8 + 4 * (12 + 8)),
])  # fmt: skip
def test_parameters_are_as_many_as_the_formula_says(settings: dict[str, bool], count: int) -> None:
    assert sum(one.numel() for one in Ffn(SHAPE, **settings).parameters()) == count


def test_relu_experts_are_one_wide_part_with_weights_by_block() -> None:
    # MoE-X: the sum over experts is one matrix product over the features of all of them.
    bank = Ffn(SHAPE, activation="relu", gated=False)
    x = tokens()
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))
    routing = Routing.from_choices(
        torch.arange(4).expand(5, -1), weights, scores=weights, logits=weights,
        valid=torch.ones(5, dtype=torch.bool),
    )  # fmt: skip
    hidden = F.relu(x @ bank.gate_up_proj.flatten(0, 1).T) * weights.repeat_interleave(6, dim=1)
    expected = hidden @ bank.down_proj.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(Experts(bank)(x, routing), expected)
    assert 0.2 < (hidden == 0).float().mean() < 0.8


def test_an_unknown_curve_is_refused() -> None:
    with pytest.raises(SettingError, match="activation of Ffn must be"):
        create("experts", "ffn", SHAPE, activation="swish")
