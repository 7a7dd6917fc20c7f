"""Attention as plain loops over rows, heads and tokens, in float64: what the methods are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10000.0


def turned(vector: Tensor, position: int) -> Tensor:
    """One head's features turned by a position: feature j goes with feature j + W/2."""
    half = len(vector) // 2
    out = vector.clone()
    for j in range(half):
        angle = position * THETA ** (-2 * j / len(vector))
        out[j] = vector[j] * math.cos(angle) - vector[half + j] * math.sin(angle)
        out[half + j] = vector[half + j] * math.cos(angle) + vector[j] * math.sin(angle)
    return out


@torch.no_grad()
def one_head(
    x: Tensor,
    weights: Sequence[Tensor],
    members: Sequence[int],
    positions: Sequence[int],
    window: int = 10**9,
) -> dict[int, Tensor]:
    """What each token of a head gathers from those that are not later, by place in the text."""
    query, key, value = (x.double() @ one.double().T for one in weights)
    found = {}
    for i, here in enumerate(members):
        seen = [j for j in range(i + 1) if here - members[j] < window]
        turned_query = turned(query[here], positions[i])
        logits = [
            float(turned_query @ turned(key[members[j]], positions[j])) / math.sqrt(query.shape[1])
            for j in seen
        ]
        shares = torch.tensor(logits, dtype=torch.float64).softmax(0)
        found[here] = sum((shares[n] * value[members[j]] for n, j in enumerate(seen)), torch.zeros(()))
    return found
