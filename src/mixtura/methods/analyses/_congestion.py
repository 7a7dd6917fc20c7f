"""Loads that experts' qualities would make: where crowds are avoided, or by a softmax with a temperature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import softmax, wrightomega

_LEAST, _MOST = 1e-3, 1e4
_GRID = 60


def equilibrium(quality: np.ndarray, gamma: float) -> np.ndarray:
    """Shares m that sum to one and are proportional to exp(quality - gamma * m).

    They are unique, as they minimise a strictly convex potential; each is an omega function of one level.

    >>> m = equilibrium(np.array([0.0, 1.0]), 2.0)
    >>> bool(np.allclose(m, softmax(np.array([0.0, 1.0]) - 2.0 * m)))
    True
    """
    if gamma <= 0:
        return np.asarray(softmax(quality))
    centred = quality - quality.max()

    def shares(level: float) -> np.ndarray:
        return np.asarray(wrightomega(centred - level + np.log(gamma))).real / gamma

    low, high = -gamma - 1.0, float(np.log(len(quality))) + 1.0
    level = brentq(lambda at: float(shares(at).sum()) - 1.0, low, high, xtol=1e-13)
    found = shares(level)
    return np.asarray(found / found.sum())


def tempered(quality: np.ndarray, temperature: float) -> np.ndarray:
    """The softmax of qualities over a temperature."""
    return np.asarray(softmax(quality / temperature))


def best_gamma(quality: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """The gamma whose equilibrium is nearest to shares, and the sum of absolute differences left."""

    def error(gamma: float) -> float:
        return float(np.abs(equilibrium(quality, gamma) - shares).sum())

    found, least = _best(error)
    at_zero = error(0.0)
    return (0.0, at_zero) if at_zero <= least else (found, least)


def best_temperature(quality: np.ndarray, shares: np.ndarray) -> float:
    """The temperature whose softmax is nearest to shares."""
    return _best(lambda temperature: float(np.abs(tempered(quality, temperature) - shares).sum()))[0]


def _best(error: Callable[[float], float]) -> tuple[float, float]:
    """The least error over a range of powers: on a grid, then between the neighbours of its best."""
    grid = np.linspace(np.log(_LEAST), np.log(_MOST), _GRID)
    errors = [error(float(np.exp(at))) for at in grid]
    place = int(np.argmin(errors))
    bounds = grid[max(0, place - 1)], grid[min(_GRID - 1, place + 1)]
    found = minimize_scalar(
        lambda at: error(float(np.exp(at))), bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    at, least = (found.x, found.fun) if found.fun < errors[place] else (grid[place], errors[place])
    return float(np.exp(at)), float(least)
