"""What is learned of a stream row after row: moments, counts by class, and which experts were right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Number, mean and sum of squares about the mean of each column so far, in rows of an array.

    The array is changed. About the mean, since far from zero squares themselves leave nothing of a variance.
    """

    seen: Float[np.ndarray, "3 D"]

    def add(self, X: Float[np.ndarray, "n D"]) -> None:
        """Count more rows."""
        number, mean, spread = self.seen
        own = X.mean(0)
        total, apart = number + len(X), own - mean
        spread += np.square(X - own).sum(0) + apart**2 * number * len(X) / total
        mean += apart * len(X) / total
        number[:] = total

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        """The mean of each column."""
        found: np.ndarray = self.seen[1]
        return found

    @property
    def variance(self) -> Float[np.ndarray, " D"]:
        """The variance of each column; 1 where it does not vary by more than numbers are rounded."""
        found = self.seen[2] / np.maximum(self.seen[0], 1)
        kept: np.ndarray = np.where(found > (1e-14 * self.mean) ** 2, found, 1.0)
        return kept

    def standardised(self, X: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        """Rows of about mean 0 and deviation 1."""
        made: np.ndarray = (X - self.mean) / np.sqrt(self.variance)
        return made


@final
@dataclass(frozen=True, slots=True, eq=False)
class NaiveBayes:
    """Several Gaussian naive Bayes classifiers as arrays, which learning changes.

    Of each class the weight of its rows, their mean, and the weighted sum of squares about it.

    A class of which an expert has seen nothing has the moments of all rows, as one row of it would.
    """

    counts: Float[np.ndarray, "E C"]
    means: Float[np.ndarray, "E C D"]
    spreads: Float[np.ndarray, "E C D"]
    moments: Moments

    def probabilities(self, X: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "E n C"]:
        """What every expert says of every row."""
        spread = self.moments.variance
        # One row of the common moments in each class keeps few rows from saying too much.
        num = self.counts[..., None] + 1
        apart = self.moments.mean - self.means
        mean = self.means + apart / num
        found = (self.spreads + spread + apart**2 * (num - 1) / num) / num
        variance = np.maximum(found, 1e-3 * spread)
        prior = np.log(self.counts + 1) - np.log((self.counts + 1).sum(1, keepdims=True))
        far = np.square(X[None, :, None] - mean[:, None]) / variance[:, None]
        logs = prior[:, None] - 0.5 * (far + np.log(variance)[:, None]).sum(-1)
        raised = np.exp(logs - logs.max(-1, keepdims=True))
        shares: np.ndarray = raised / raised.sum(-1, keepdims=True)
        return shares

    def add(
        self,
        X: Float[np.ndarray, "n D"],
        numbers: Int[np.ndarray, " n"],
        chosen: Int[np.ndarray, "n K"],
        forget: float,
    ) -> None:
        """Let each row's experts learn it; what they learned before counts ``forget`` times, a row each."""
        for row, (values, number) in enumerate(zip(X, numbers, strict=True)):
            for expert in chosen[row]:
                for kept in (self.counts, self.spreads):
                    kept[expert] *= forget
                self.counts[expert, number] += 1
                apart = values - self.means[expert, number]
                self.means[expert, number] += apart / self.counts[expert, number]
                self.spreads[expert, number] += apart * (values - self.means[expert, number])


def wanted_experts(
    probabilities: Float[np.ndarray, "E n C"], numbers: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n E"]:
    """1 for the experts that are right on a row; where none is, for the one that gave its class most."""
    right = (probabilities.argmax(-1) == numbers).T
    given = probabilities[:, np.arange(len(numbers)), numbers].T
    best = np.arange(given.shape[1]) == given.argmax(1)[:, None]
    wanted: np.ndarray = np.where(right.any(1, keepdims=True), right, best).astype(np.float64)
    return wanted


def step_down(
    router: nn.Module, x: Float[Tensor, "n D"], wanted: Float[Tensor, "n E"], rate: float
) -> Float[Tensor, "n E"]:
    """The router's logits of rows, and one plain step that brings them nearer to the wanted experts."""
    logits = router(x)
    router.zero_grad()
    F.binary_cross_entropy_with_logits(logits, wanted).backward()
    with torch.no_grad():
        for weight in router.parameters():
            assert weight.grad is not None
            weight.sub_(rate * weight.grad)
    given: Tensor = logits.detach()
    return given
