"""Groups whose size is another in every row: how wide they are, and where their scales lie."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def mean_range(weight: Float[Tensor, "R C"], size: int) -> Float[Tensor, " R"]:
    """The largest weight of a group, mean over a row's groups by their weights."""
    rows, cols = weight.shape
    groups = F.pad(weight.abs(), (0, -cols % size)).view(rows, -1, size)
    counts = torch.full((groups.shape[1],), float(size))
    counts[-1] -= -cols % size
    return groups.amax(-1) @ counts / cols


def places(halvings: Int[Tensor, " R"], cols: int) -> Int[Tensor, "R C"]:
    """For each weight the place of its scale."""
    sizes = -(-cols // 2**halvings)
    counts = -(-cols // sizes)
    return (counts.cumsum(0) - counts)[:, None] + torch.arange(cols) // sizes[:, None]
