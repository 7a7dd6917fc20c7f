"""The curves between two matrices of an expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "tanh", "none"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _same(x: Tensor) -> Tensor:
    return x


CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "tanh": torch.tanh,
    "none": _same,
}


def swiglu(features: Float[Tensor, "*n F2"]) -> Float[Tensor, "*n F"]:
    """``silu(gate) * up``, where the first half of the features is the gate and the second is up."""
    gate, up = features.chunk(2, dim=-1)
    return F.silu(gate) * up


def curve_of(name: Activation, *, gated: bool) -> Callable[[Tensor], Tensor]:
    """The activation between an expert's matrices; where ``gated`` of the first half, times the second."""
    curve = CURVES[name]
    if not gated:
        return curve
    if name == "silu":
        return swiglu

    def of_halves(features: Tensor) -> Tensor:
        gate, up = features.chunk(2, dim=-1)
        return curve(gate) * up

    return of_halves
