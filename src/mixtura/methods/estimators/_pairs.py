"""Rows that belong together in pairs: who belongs with whom, and the loss that brings them together."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError


def pairs_of(y: Any, num_rows: int, owner: str) -> tuple[np.ndarray, np.ndarray]:
    """Both rows of every pair, each pair once.

    Raises:
        UserError: there is not a partner a row, or one that does not exist.
    """
    partners = np.zeros(0) if y is None else np.asarray(y)
    whole = partners.dtype.kind in "iu" or (partners.dtype.kind == "f" and (partners % 1 == 0).all())
    if partners.shape != (num_rows,) or not whole:
        raise UserError(
            f"{owner} requires y to be passed as the number of each row's partner, {num_rows} in all, "
            f"got {'none' if y is None else f'{partners.dtype} of shape {partners.shape}'}"
        )
    partners = partners.astype(np.int64)
    rows = np.arange(num_rows)
    if ((partners < 0) | (partners >= num_rows) | (partners == rows)).any():
        raise UserError(f"a partner of {owner} must be another row, from 0 to {num_rows - 1}; look at y")
    # A pair that is named by both its rows is one: the second time its rows would repel each other.
    first = (rows < partners) | (partners[partners] != rows)
    return rows[first], partners[first]


def ranking_loss(a: Float[Tensor, "T D"], b: Float[Tensor, "T D"], scale: float) -> Float[Tensor, ""]:
    """Multiple negatives ranking both ways: row i of each is to be nearest to row i of the other."""
    logits = scale * a @ b.T
    wanted = torch.arange(len(a))
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def recall_at_one(vectors: Float[np.ndarray, "n D"], partners: np.ndarray) -> float:
    """Of how many rows the nearest other row is the partner."""
    near = vectors @ vectors.T
    np.fill_diagonal(near, -np.inf)
    return float((near.argmax(1) == partners).mean())


def copies(module: nn.Module, num: int) -> nn.ModuleList:
    """A module as several that are equal at first."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(num))
