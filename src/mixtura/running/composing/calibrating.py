"""Making what a router expects agree with what comes: one straight line of log-odds for all models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float

_ROUNDS: Final = 50
_EDGE: Final = 1e-4
_SMALL: Final = 1e-10
# A little of the line y = x, so that outcomes that are all alike do not send it to infinity.
_PULL: Final = 1e-2
# A slope of less would turn differences between models, which routing rests on, into none.
_LEAST_SLOPE: Final = 1e-3
_BINS: Final = 10


@final
@dataclass(frozen=True, slots=True)
class Calibration:
    """``log-odds -> slope * log-odds + offset``. It rises, so that it changes no order of models.

    Attributes:
        slope: greater than 0.
        offset: added.
        error_before: mean difference between expectation and outcome over ten bins, on the prompts that
            it was fitted on, before.
        error_after: the same after.
        num_prompts: that it was fitted on.
    """

    slope: float = 1.0
    offset: float = 0.0
    error_before: float = float("nan")
    error_after: float = float("nan")
    num_prompts: int = 0

    def __call__(self, quality: Float[np.ndarray, "P M"]) -> Float[np.ndarray, "P M"]:
        """Expected scores that agree with outcomes; what is not known stays so."""
        if self.num_prompts == 0:
            return quality
        return _share(self.slope * _odds(quality) + self.offset)

    def errors(
        self, quality: Float[np.ndarray, "P M"], error: Float[np.ndarray, "P M"]
    ) -> Float[np.ndarray, "P M"]:
        """Standard errors of expected scores after calibration, from those before."""
        if self.num_prompts == 0:
            return error
        before = np.clip(quality, _EDGE, 1 - _EDGE)
        after = self(quality)
        out: np.ndarray = error * self.slope * after * (1 - after) / (before * (1 - before))
        return out


def calibrate(quality: Float[np.ndarray, "P M"], scores: Float[np.ndarray, "P M"]) -> Calibration:
    """The line of least log loss between expected and true scores (Platt's), by Newton's method.

    Args:
        quality: expected scores of prompts that were not learned from.
        scores: what came.
    """
    known = ~np.isnan(quality) & ~np.isnan(scores)
    if not known.any():
        return Calibration()
    x, y = _odds(quality[known]), scores[known]
    points = np.stack([x, np.ones_like(x)], axis=1)
    line = np.array([1.0, 0.0])
    for _ in range(_ROUNDS):
        share = _share(points @ line)
        slope = points.T @ (share - y) + _PULL * (line - [1.0, 0.0])
        curve = points.T @ (points * (share * (1 - share))[:, None]) + _PULL * np.eye(2)
        move = np.linalg.solve(curve, slope)
        while _loss(line - move, points, y) > _loss(line, points, y) and np.abs(move).max() > _SMALL:
            move = move / 2
        line = line - move
        if np.abs(move).max() <= _SMALL:
            break
    found = Calibration(max(float(line[0]), _LEAST_SLOPE), float(line[1]), num_prompts=len(quality))
    before, after = (calibration_error(one, scores) for one in (quality, found(quality)))
    return Calibration(found.slope, found.offset, before, after, len(quality))


def _loss(
    line: Float[np.ndarray, " 2"], points: Float[np.ndarray, "N 2"], y: Float[np.ndarray, " N"]
) -> float:
    odds = points @ line
    pull = _PULL / 2 * ((line - [1.0, 0.0]) ** 2).sum()
    return float((np.logaddexp(0, odds) - y * odds).sum() + pull)


def calibration_error(quality: Float[np.ndarray, "P M"], scores: Float[np.ndarray, "P M"]) -> float:
    """Mean absolute difference between expected and true score over ten equal bins of expectation."""
    known = ~np.isnan(quality) & ~np.isnan(scores)
    if not known.any():
        return float("nan")
    expected, true = quality[known], scores[known]
    bins = np.minimum((expected * _BINS).astype(int), _BINS - 1)
    sums = [abs((expected[bins == b] - true[bins == b]).sum()) for b in range(_BINS)]
    return float(sum(sums) / len(expected))


def _odds(share: Float[np.ndarray, "*A"]) -> Float[np.ndarray, "*A"]:
    inner = np.clip(share, _EDGE, 1 - _EDGE)
    out: np.ndarray = np.log(inner / (1 - inner))
    return out


def _share(odds: Float[np.ndarray, "*A"]) -> Float[np.ndarray, "*A"]:
    return 0.5 * (1 + np.tanh(0.5 * odds))
