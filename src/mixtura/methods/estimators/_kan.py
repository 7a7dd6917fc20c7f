"""Networks whose edges are curves: each input goes through a function of its own, made of splines."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

CELLS: Final = 5
ORDER: Final = 3
# Standardised values lie within; beyond, a curve is its smooth part alone.
REACH: Final = 3.0


def splines(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S B"]:
    """Cubic B-splines at each value, on `CELLS` cells within `REACH` of 0; there they sum to 1."""
    step = 2 * REACH / CELLS
    knots = torch.arange(-ORDER, CELLS + ORDER + 1, dtype=x.dtype) * step - REACH
    at = x[..., None]
    found = ((at >= knots[:-1]) & (at < knots[1:])).to(x.dtype)
    for order in range(1, ORDER + 1):
        rising = (at - knots[: -order - 1]) / (order * step) * found[..., :-1]
        falling = (knots[order + 1 :] - at) / (order * step) * found[..., 1:]
        found = rising + falling
    return found


@final
class Curves(nn.Module):
    """Sums of curves: output j of inputs i is the sum of ``a_ij silu(x_i) + sum_b c_ijb B_b(x_i)``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.smooth = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bends = nn.Parameter(0.1 * torch.randn(d_in, CELLS + ORDER, d_out) / d_in**0.5)

    def forward(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """What all curves add up to."""
        return F.silu(x) @ self.smooth + torch.einsum("tib,ibo->to", splines(x), self.bends)


def kan(*widths: int) -> nn.Sequential:
    """Layers of curves of these widths."""
    return nn.Sequential(*(Curves(wide, narrow) for wide, narrow in pairwise(widths)))
