"""Loads that experts' qualities would make: where crowds are avoided, or by a softmax with a temperature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax, wrightomega

_LEAST, _MOST = 1e-3, 1e4
_GRID = 60
_MOST_STEPS, _TOLERANCE = 200, 1e-12


def equilibrium(quality: np.ndarray, gamma: float) -> np.ndarray:
    """Shares m that sum to one and are proportional to exp(quality - gamma * m).

    They are unique, as they minimise a strictly convex potential; each is an omega function of one level.

    >>> m = equilibrium(np.array([0.0, 1.0]), 2.0)
    >>> bool(np.allclose(m, softmax(np.array([0.0, 1.0]) - 2.0 * m)))
    True
    """
    return np.asarray(softmax(quality)) if gamma <= 0 else equilibria(quality, np.array([gamma]))[0]


def equilibria(quality: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """A row of such shares for each gamma; all gammas are above 0.

    Newton's steps find the levels: the sum of the shares is convex and falls in the level, and they begin
    where it is too large.
    """
    gamma = gammas[:, None]
    centred = quality - quality.max() + np.log(gamma)
    level = -gamma - 1.0
    for _ in range(_MOST_STEPS):
        omega = np.asarray(wrightomega(centred - level)).real
        step = (omega.sum(1, keepdims=True) - gamma) / (omega / (1 + omega)).sum(1, keepdims=True)
        level = level + step
        if np.abs(step).max() <= _TOLERANCE:
            break
    found = np.asarray(wrightomega(centred - level)).real
    return np.asarray(found / found.sum(1, keepdims=True))


def tempered(quality: np.ndarray, temperature: float) -> np.ndarray:
    """The softmax of qualities over a temperature."""
    return np.asarray(softmax(quality / temperature))


def best_gamma(quality: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """The gamma whose equilibrium is nearest to shares, and the sum of absolute differences left."""
    found, least = _best(lambda gammas: np.abs(equilibria(quality, gammas) - shares).sum(1))
    at_zero = float(np.abs(equilibrium(quality, 0.0) - shares).sum())
    return (0.0, at_zero) if at_zero <= least else (found, least)


def best_temperature(quality: np.ndarray, shares: np.ndarray) -> float:
    """The temperature whose softmax is nearest to shares."""
    return _best(lambda values: np.abs(softmax(quality / values[:, None], axis=1) - shares).sum(1))[0]


def _best(errors: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """The least error over a range of powers: on a grid, then between the neighbours of its best."""
    grid = np.linspace(np.log(_LEAST), np.log(_MOST), _GRID)
    tried = errors(np.exp(grid))
    place = int(np.argmin(tried))
    bounds = grid[max(0, place - 1)], grid[min(_GRID - 1, place + 1)]
    found = minimize_scalar(
        lambda at: errors(np.exp(np.array([at])))[0], bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    at, least = (found.x, found.fun) if found.fun < tried[place] else (grid[place], tried[place])
    return float(np.exp(at)), float(least)
