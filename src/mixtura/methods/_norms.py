"""Root mean square norms, which attentions, forms and the decoder have alike."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods._precision import exact


@final
class RMSNorm(nn.Module):
    """Divide by the root mean square in float32 at least, then scale each feature."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n W"]) -> Float[Tensor, "*n W"]:
        """The normed features in the dtype of ``x``."""
        wide = exact(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
