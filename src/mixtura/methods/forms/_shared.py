"""Mathematics that forms share: norms and feed-forward parts of their own."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import generator_of, normal
from mixtura.methods._precision import exact

_EPS = 1e-6


@final
class Norm(nn.Module):
    """Divide by the root mean square in float32 at least, then scale each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The normed features in the dtype of ``x``."""
        wide = exact(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)
        return self.weight * normed.to(x.dtype)


@final
class GatedMlp(nn.Module):
    """A dense gated feed-forward part, ``down @ (silu(gate @ x) * (up @ x))``, drawn from a seed."""

    def __init__(self, d_model: int, width: int, seed: int) -> None:
        super().__init__()
        generator = generator_of(seed)

        def drawn(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(normal(generator, rows, columns) / columns**0.5)

        self.gate, self.up, self.down = drawn(width, d_model), drawn(width, d_model), drawn(d_model, width)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """What it makes of each token."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)
