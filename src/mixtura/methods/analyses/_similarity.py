"""How alike vectors, experts and rankings are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F


def cosines(vectors: Float[Tensor, "N W"]) -> Float[Tensor, "N N"]:
    """Of every two vectors."""
    normed = F.normalize(vectors.double(), dim=-1)
    return normed @ normed.T


def _below(table: Float[Tensor, "N N"]) -> Float[Tensor, " _"]:
    return table[tuple(torch.tril_indices(len(table), len(table), offset=-1))]


def mean_below(table: Float[Tensor, "N N"]) -> float | None:
    return float(_below(table).mean()) if len(table) > 1 else None


def pairwise(vectors: Float[Tensor, "N W"]) -> float | None:
    """The mean cosine of every two of some vectors."""
    return mean_below(cosines(vectors))


def squared_correlation(one: Float[Tensor, "N N"], other: Float[Tensor, "N N"]) -> float | None:
    """Pearson's, squared, of the entries below the diagonal; None where one of them does not vary."""
    both = torch.stack([_below(one), _below(other)])
    spread = both - both.mean(1, keepdim=True)
    size = spread.norm(dim=1)
    return float(((spread[0] @ spread[1]) / size.prod()).square()) if bool((size > 1e-12).all()) else None


def rank_counts(norms: Float[Tensor, "T E"], scores: Float[Tensor, "T E"]) -> Float[Tensor, "E E"]:
    """How often an expert of some place by its norm (down) has some place by its score (across)."""
    places = [one.double().cpu().argsort(-1).argsort(-1) for one in (norms, scores)]
    size = norms.shape[1]
    cells = (places[0] * size + places[1]).flatten()
    return torch.bincount(cells, minlength=size * size).view(size, size).double()


def matched(one: Float[Tensor, "F D"], other: Float[Tensor, "F D"]) -> float:
    """The mean cosine of two experts' neurons after the matching in which it is greatest."""
    table = F.normalize(one.double(), dim=-1) @ F.normalize(other.double(), dim=-1).T
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    return float(table.cpu()[rows, columns].mean())
