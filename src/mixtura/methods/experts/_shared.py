"""Mathematics that experts share: products by expert, matrices as they are drawn."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import generator_of, normal


def drawn_matrices(generator: torch.Generator, *shape: int) -> nn.Parameter:
    """Matrices from a normal distribution whose variance is one over their inputs."""
    return nn.Parameter(normal(generator, *shape) / shape[-1] ** 0.5)


def begun(seed: int) -> torch.Generator:
    """The generator that a bank draws all its parameters from, one after another."""
    return generator_of(seed)


def grouped(
    rows: Float[Tensor, "N A"],
    weight: Float[Tensor, "E B A"],
    offsets: Int[Tensor, " E"],
    bias: Float[Tensor, "E B"] | None = None,
) -> Float[Tensor, "N B"]:
    """Each row times the matrix of its expert; rows are sorted by expert, whose runs end at ``offsets``."""
    parts, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            added = None if bias is None else bias[expert]
            parts.append(F.linear(rows[start:end], weight[expert], added))
        start = end
    return torch.cat(parts) if parts else rows.new_zeros(0, weight.shape[1]) + 0.0 * weight.sum()


def multiplied(
    rows: Float[Tensor, "N A"],
    ids: Int[Tensor, " N"],
    weight: Float[Tensor, "E B A"],
    bias: Float[Tensor, "E B"] | None = None,
) -> Float[Tensor, "N B"]:
    """Each row times the matrix of its number; rows are in any order."""
    order = torch.sort(ids, stable=True).indices
    offsets = torch.bincount(ids, minlength=weight.shape[0]).cumsum(0)
    made = grouped(rows[order], weight, offsets, bias)
    return torch.zeros_like(made).index_copy(0, order, made)
