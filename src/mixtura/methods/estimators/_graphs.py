"""Graphs between rows: edges that are given or nearest neighbours, and networks that average over them."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods._scores import entropy
from mixtura.methods.estimators._networks import perceptron

Edges = Int[np.ndarray, "2 m"]


def edges_of(given: Any, num_rows: int, owner: str) -> Edges:
    """Edges as pairs of row numbers, from the first row of the array to the second.

    Raises:
        UserError: they are something else, or name rows that do not exist.
    """
    try:
        edges = np.asarray(given)
    except ValueError:
        raise UserError(
            f"edges of {owner} are whole numbers of shape [2, m], got rows of several lengths"
        ) from None
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype.kind not in "iu":
        raise UserError(
            f"edges of {owner} are whole numbers of shape [2, m], got {edges.dtype} of shape {edges.shape}"
        )
    if edges.size and (edges.min() < 0 or edges.max() >= num_rows):
        raise UserError(
            f"edges of {owner} name rows from 0 to {num_rows - 1}, got {edges.min()} to {edges.max()}"
        )
    return edges.astype(np.int64)


def nearest(known: Float[np.ndarray, "n D"], rows: Float[np.ndarray, "r D"] | None, num: int) -> Edges:
    """Edges to each row from its nearest known rows; without rows, among the known, none to itself."""
    from sklearn.neighbors import NearestNeighbors

    num = min(num, len(known) - (rows is None))
    if num < 1:
        return np.zeros((2, 0), np.int64)
    found = NearestNeighbors(n_neighbors=num).fit(known).kneighbors(rows, return_distance=False)
    ends = np.repeat(np.arange(len(found)), num)
    return np.stack([found.reshape(-1), ends]).astype(np.int64)


def neighbours_mean(x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n D"]:
    """The mean of the rows from which edges come; zeros for a row that none reaches."""
    sums = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
    count = torch.bincount(edges[1], minlength=len(x)).clamp(min=1)
    return sums / count[:, None]


@final
class GraphNetwork(nn.Module):
    """Two layers, each a perceptron of a row beside the mean of its neighbours."""

    def __init__(self, d_in: int, width: int, d_out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * d_in, width), nn.Linear(2 * width, d_out)

    def forward(self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n O"]:
        """The output of every row."""
        h = self.first(torch.cat([x, neighbours_mean(x, edges)], dim=-1)).relu()
        made: Tensor = self.second(torch.cat([h, neighbours_mean(h, edges)], dim=-1))
        return made


@final
class WeakAndStrong(nn.Module):
    """A perceptron that sees a row alone, and a network of the graph."""

    def __init__(self, d_in: int, width: int, d_out: int) -> None:
        super().__init__()
        self.weak = perceptron(d_in, width, d_out)
        self.strong = GraphNetwork(d_in, width, d_out)


def confidence(logits: Float[Tensor, "T C"], kind: str, power: float) -> Float[Tensor, "T 1"]:
    """How far a softmax is from even: 0 where it is, 1 where one class has everything."""
    shares, num = logits.softmax(-1), logits.shape[1]
    if kind == "variance":
        found = (shares - 1 / num).square().sum(-1, keepdim=True) / (1 - 1 / num)
    else:
        found = 1 - entropy(shares)[:, None] / np.log(num)
    return found.clamp(0, 1) ** power
