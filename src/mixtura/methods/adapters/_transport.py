"""How two sets of vectors go together that lie in no common space: the distance of Gromov and Wasserstein."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_OUTER, _INNER = 30, 50


def spread(rows: Float[Tensor, "V D"], most: int) -> Float[Tensor, "N D"]:
    """So many of the rows at most, evenly spaced."""
    places = torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long()
    return rows[places.to(rows.device)]


def distances(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
    """Euclidean distances of all pairs, over the greatest."""
    found = torch.cdist(rows, rows)
    return found / found.max().clamp(min=1e-300)


def coupling(
    first: Float[Tensor, "N N"], second: Float[Tensor, "P P"], entropy: float = 0.005
) -> Float[Tensor, "N P"]:
    """A plan between two sets, each with even weights, under which distances change least.

    The entropic way: the squared differences of distances under the plan so far are the cost of the next
    plan, which Sinkhorn's iteration finds. Each set's points are begun by their mean distance, since the even
    plan tells points of different places apart as little as any.
    """
    rows, cols = (
        first.new_full((len(first),), 1 / len(first)),
        first.new_full((len(second),), 1 / len(second)),
    )
    plan = _sinkhorn((first.mean(1)[:, None] - second.mean(1)).square(), rows, cols, entropy)
    for _ in range(_OUTER):
        constant = (first.square() @ rows)[:, None] + second.square() @ cols
        plan = _sinkhorn(constant - 2 * first @ plan @ second.T, rows, cols, entropy)
    return plan


def _sinkhorn(
    cost: Float[Tensor, "N P"], rows: Float[Tensor, " N"], cols: Float[Tensor, " P"], entropy: float
) -> Float[Tensor, "N P"]:
    logs = -cost / entropy
    left, right = torch.zeros_like(rows), torch.zeros_like(cols)
    for _ in range(_INNER):
        left = rows.log() - (logs + right).logsumexp(1)
        right = cols.log() - (logs + left[:, None]).logsumexp(0)
    return (logs + left[:, None] + right).exp()
