"""Logistic regressions on embeddings, one a model, and how sure they are."""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Float

from mixtura.methods.model_routers._shared import filled, sigmoid

_ROUNDS: Final = 300
# Slopes of the mean loss that are as good as none.
_FLAT: Final = 1e-6


def fit_heads(
    points: Float[np.ndarray, "P N"], targets: Float[np.ndarray, "P M"], decay: float
) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "N M"]]:
    """Weights of least mean log loss with ``decay / 2`` times their squares; the last feature is not decayed.

    By Nesterov's accelerated gradients with the step that the largest eigenvalue allows, from zero, so that
    there is nothing to draw or to tune.

    Args:
        points: features; the last is always 1.
        targets: in [0, 1]; NaN where there is none.
        decay: of all weights but the last.

    Returns:
        The weights, and the diagonal of the log loss's curvature, both by feature and model. A model without
        any target has NaN.
    """
    values, seen = filled(targets)
    count = np.maximum(seen.sum(0), 1)
    decays = np.full((points.shape[1], 1), decay)
    decays[-1] = 1e-6
    # The largest eigenvalue of a mean of squares of rows is no more than the largest row's square.
    step = 1 / (0.25 * (points**2).sum(1).max(initial=1e-12) + decay)
    weights = ahead = np.zeros((points.shape[1], targets.shape[1]))
    pace = 1.0
    for _ in range(_ROUNDS):
        wrong = np.where(seen, sigmoid(points @ ahead) - values, 0.0) / count
        slope = points.T @ wrong + decays * ahead
        if np.abs(slope).max(initial=0.0) < _FLAT:
            break
        moved = ahead - step * slope
        # Starting the acceleration anew where it overshoots keeps it from swinging.
        turned = (((ahead - moved) * (moved - weights)).sum(0) > 0).any()
        faster = 1.0 if turned else (1 + (1 + 4 * pace**2) ** 0.5) / 2
        ahead = moved + (0.0 if turned else (pace - 1) / faster) * (moved - weights)
        weights, pace = moved, faster
    shares = sigmoid(points @ weights)
    curvature = (points**2).T @ np.where(seen, shares * (1 - shares), 0.0) + decays * count
    known = seen.any(0)
    return np.where(known, weights, np.nan), np.where(known, curvature, np.nan)


def head_errors(
    points: Float[np.ndarray, "P N"], quality: Float[np.ndarray, "P M"], curvature: Float[np.ndarray, "N M"]
) -> Float[np.ndarray, "P M"]:
    """Standard errors of the shares that heads predict, by Laplace's approximation with a diagonal."""
    variance: Float[np.ndarray, "P M"] = (points**2) @ (1 / np.maximum(curvature, 1e-12))
    out: np.ndarray = quality * (1 - quality) * np.sqrt(variance)
    return out
