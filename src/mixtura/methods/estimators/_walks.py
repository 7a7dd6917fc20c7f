"""Vectors of columns by walks between rows and columns, and clusters whose number is not said before."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.estimators._training import minimise


def walks(
    weights: Float[np.ndarray, "n D"],
    length: int,
    each: int,
    back: float,
    away: float,
    generator: np.random.Generator,
) -> list[list[int]]:
    """Walks of columns: from a column to a row that has much of it, on to a column of that row, and so on.

    Where a walk came from is ``1 / back`` as likely as its weight says, and every other row or column, which
    is two steps from there, ``1 / away``. Columns without weight are not walked from.
    """
    found = []
    for start in np.flatnonzero(weights.sum(0) > 0).repeat(each):
        walk, row = [int(start)], -1
        while len(walk) < length:
            row = _step(weights[:, walk[-1]], row, back, away, generator)
            walk.append(_step(weights[row], walk[-1], back, away, generator))
        found.append(walk)
    return found


def _step(
    weights: Float[np.ndarray, " n"], before: int, back: float, away: float, generator: np.random.Generator
) -> int:
    odds = weights / away
    if before >= 0:
        odds[before] *= away / back
    return int(generator.choice(len(odds), p=odds / odds.sum()))


def vectors(
    paths: list[list[int]], num: int, width: int, reach: int, epochs: int, learning_rate: float
) -> Float[np.ndarray, "D W"]:
    """Vectors of columns such that those near each other on walks point the same way (skip-gram).

    Against each true neighbour one is drawn at random. The generator of PyTorch decides.
    """
    pairs = [
        (walk[i], walk[j])
        for walk in paths
        for i in range(len(walk))
        for j in range(max(0, i - reach), min(len(walk), i + reach + 1))
        if i != j
    ]
    table = torch.tensor(pairs or [(0, 0)])
    own = torch.nn.Parameter(torch.randn(num, width, dtype=torch.float64) / width**0.5)
    other = torch.nn.Parameter(torch.zeros(num, width, dtype=torch.float64))

    def lost(rows: Tensor, progress: float) -> Tensor:
        centre, near = table[rows].T
        drawn = torch.randint(num, near.shape)
        right = (own[centre] * other[near]).sum(-1)
        wrong = (own[centre] * other[drawn]).sum(-1)
        return (F.softplus(-right) + F.softplus(wrong)).mean()

    parts = [own, other]
    minimise(parts, lost, len(table), epochs=epochs, batch_size=256, learning_rate=learning_rate)
    found: np.ndarray = own.detach().numpy()
    return found


def dp_means(rows: Float[np.ndarray, "n W"], wide: float, rounds: int = 50) -> Int[np.ndarray, " n"]:
    """Clusters of rows: as k-means, but a row further than ``wide`` from every centre begins a new one."""
    centres = rows.mean(0, keepdims=True)
    label = np.zeros(len(rows), dtype=int)
    for _ in range(rounds):
        before = label.copy()
        for place, row in enumerate(rows):
            apart = ((centres - row) ** 2).sum(1)
            # The furthest of all may be as far as is allowed, to the last bit.
            if apart.min() > wide**2 * (1 + 1e-9):
                centres = np.concatenate([centres, row[None]])
                label[place] = len(centres) - 1
            else:
                label[place] = apart.argmin()
        used, label = np.unique(label, return_inverse=True)
        centres = np.stack([rows[label == one].mean(0) for one in range(len(used))])
        if np.array_equal(before, label):
            break
    return label


def refined(
    rows: Float[np.ndarray, "n W"],
    kinds: Int[np.ndarray, " n"],
    wide: float,
    alike: float,
    levels: int,
) -> Int[np.ndarray, " n"]:
    """Clusters from coarse to fine: those whose rows are not of one kind mostly are cut up, half as wide."""
    label = dp_means(rows, wide)
    for level in range(1, levels):
        fine = label.copy()
        for one in np.unique(label):
            mine: Bool[np.ndarray, " n"] = label == one
            if np.bincount(kinds[mine]).max() < alike * mine.sum():
                fine[mine] = fine.max() + 1 + dp_means(rows[mine], wide / 2**level)
        label = np.unique(fine, return_inverse=True)[1]
    return label


def even_draw(
    label: Int[np.ndarray, " n"], num: int, generator: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """So many rows, as many of each cluster as it has, in turns; in ascending order."""
    turns = np.empty(len(label))
    for one in np.unique(label):
        mine = np.flatnonzero(label == one)
        turns[generator.permutation(mine)] = np.arange(len(mine))
    order = np.lexsort((generator.random(len(label)), turns))
    drawn: np.ndarray = np.sort(order[:num])
    return drawn


def kinds_of(y: np.ndarray, num_rows: int) -> np.ndarray:
    """The number of each row's label, from 0.

    Raises:
        UserError: there is not one label a row, or labels are of several types.
    """
    if y.shape != (num_rows,):
        raise UserError(f"y of MasterySampler is a label a row, {num_rows} of them, or None")
    try:
        numbers: np.ndarray = np.unique(y, return_inverse=True)[1]
    except TypeError:
        raise UserError("labels of MasterySampler are of one type, got several") from None
    return numbers
