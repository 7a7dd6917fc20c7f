"""Mixtures that a search may try, and how well each is predicted to do from those that were tried."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.methods._drawing import generator_of

# Mixtures of which the best predicted is looked for, times the number of domains.
_POOL = 512


def candidates(order: Int[Tensor, " G"], seed: int) -> Float[Tensor, "P G"]:
    """Mixtures that may be tried, the equal one first, each in all rotations one after the other.

    Args:
        order: the places of domains by their names, so that domains listed otherwise have the same shares.
        seed: of a flat Dirichlet distribution.
    """
    generator = generator_of(seed)
    drawn = -torch.rand(_POOL, len(order), generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
    drawn[0] = 1.0
    drawn = drawn / drawn.sum(1, keepdim=True)
    turned = torch.stack([drawn.roll(turn, 1) for turn in range(len(order))], 1).flatten(0, 1)
    return turned[:, order.argsort()]


def predicted(
    tried: Float[Tensor, "N G"],
    before: Float[Tensor, " N"],
    falls: Float[Tensor, " N"],
    new: Float[Tensor, "P G"],
    penalty: float,
) -> Float[Tensor, " P"]:
    """How far the loss would fall with new mixtures, but for a constant: ridge on shares and their squares.

    What the loss was before each trial is a feature too, as it falls less and less.
    """
    rows = torch.cat([_features(tried), (before - before.mean())[:, None]], 1)
    rows = rows - rows.mean(0)
    gram = rows.T @ rows + penalty * torch.eye(rows.shape[1], dtype=torch.float64)
    learned = torch.linalg.solve(gram, rows.T @ (falls - falls.mean()))
    found: Tensor = _features(new) @ learned[:-1]
    return found


def _features(weights: Float[Tensor, "N G"]) -> Float[Tensor, "N H"]:
    return torch.cat([weights, weights.square()], 1)
