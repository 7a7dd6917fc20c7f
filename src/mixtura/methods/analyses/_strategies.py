"""The odds of memorising against generalising, by loss and complexity."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import expit


def odds(logs: np.ndarray, data: np.ndarray) -> np.ndarray:
    """The log odds of memorising by the logarithms of alpha, beta and gamma."""
    alpha, beta, gamma = np.exp(np.clip(logs, -20, 5))
    gain = gamma * data[:, 0] ** (1 - alpha) * (data[:, 3] - data[:, 2])
    found: np.ndarray = gain - math.log(2) * (data[:, 4] ** beta - data[:, 5] ** beta)
    return found


def misfit(logs: np.ndarray, data: np.ndarray, share: np.ndarray) -> float:
    """The mean squared difference of the law's shares from those seen."""
    return float(((expit(odds(logs, data)) - share) ** 2).mean())


def crossing(part: np.ndarray, alpha: float, beta: float, gamma: float) -> float | None:
    """The step at which the odds are even, with the losses and complexities of the first row."""
    gap, price = part[0, 3] - part[0, 2], math.log(2) * (part[0, 4] ** beta - part[0, 5] ** beta)
    if gap <= 0 or price <= 0 or alpha >= 1:
        return None
    return float((price / (gamma * gap)) ** (1 / (1 - alpha)))
