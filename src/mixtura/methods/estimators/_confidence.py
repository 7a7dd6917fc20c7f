"""How sure a classifier may be: rows held out, a curve that never falls, and what predictions are worth."""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

BINS: Final = 10


def held_out(numbers: Int[np.ndarray, " n"], share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """A share of the rows of each class, drawn; of one that has two rows or more, at least one is left."""
    generator, aside = np.random.default_rng(seed), np.zeros(len(numbers), dtype=bool)
    for label in np.unique(numbers):
        mine = generator.permutation(np.flatnonzero(numbers == label))
        aside[mine[: min(int(share * len(mine)), len(mine) - 1)]] = True
    return aside


def monotone(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "2 K"]:
    """The isotonic curve of how often one is right over how sure one is: its corners; none without rows.

    One row right and one wrong are counted beside, so that few rows do not say never or always.
    """
    if not len(confidence):
        return np.zeros((2, 0))
    from sklearn.isotonic import IsotonicRegression

    ends = np.array([confidence.min(), confidence.max()])
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        np.concatenate([confidence, ends]), np.concatenate([right.astype(float), [0.0, 1.0]])
    )
    return np.stack([fitted.X_thresholds_, fitted.y_thresholds_])


def restated(shares: Float[np.ndarray, "n C"], curve: Float[np.ndarray, "2 K"]) -> Float[np.ndarray, "n C"]:
    """Probabilities whose highest goes by the curve; the others share the rest as before.

    The likeliest stays so: the curve is not followed below where the second would overtake it.
    """
    if not curve.shape[1] or not len(shares):
        return shares
    rows, first = np.arange(len(shares)), shares.argmax(1)
    top = shares[rows, first]
    rest = np.maximum(1 - top, 1e-12)
    second = np.partition(shares, -2, axis=1)[:, -2] / rest
    least = second / (1 + second)
    stated = np.maximum(np.interp(top, *curve), least + 1e-9)
    made = shares * ((1 - stated) / rest)[:, None]
    made[rows, first] = stated
    found: np.ndarray = made / made.sum(1, keepdims=True)
    return found


def reliability(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], sure: float
) -> dict[str, float]:
    """How often one is right, in all and where sure; which share that is; and the calibration error.

    The error is the mean distance between confidence and being right, over rows, in bins of equal width.
    """
    is_sure = confidence >= sure
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    apart = [abs(confidence[place == b].sum() - right[place == b].sum()) for b in range(BINS)]
    return {
        "accuracy": float(right.mean()) if len(right) else float("nan"),
        "accuracy where sure": float(right[is_sure].mean()) if is_sure.any() else float("nan"),
        "share sure": float(is_sure.mean()) if len(right) else float("nan"),
        "calibration error": float(sum(apart) / len(right)) if len(right) else float("nan"),
    }
