"""Mathematics that forms share: feed-forward parts of their own."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import generator_of, normal


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
