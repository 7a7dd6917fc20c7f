"""What a comparison of estimators is: rows to learn, rows to test, who takes part and what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

Draw = np.random.Generator


@final
@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Rows that are learned from and new ones that are tested on; ``more`` is known of them beside.

    Its ``edges`` go to those who read edges; the rest is for who measures.
    """

    X: np.ndarray
    y: np.ndarray
    new_x: np.ndarray
    new_y: np.ndarray
    more: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """One comparison: who takes part, on what, and what counts.

    Attributes:
        name: in the table.
        about: the data in a sentence.
        measure: of `mixtura.running.estimating.measures`, larger is better.
        baselines: the family of plain models.
        entries: estimators by name with settings of theirs.
        draw: the data of a seed.
    """

    name: str
    about: str
    measure: str
    baselines: str
    entries: Mapping[str, Mapping[str, Any]]
    draw: Callable[[Draw], Lesson]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's pictures of digits."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return X, y


def split(X: np.ndarray, y: np.ndarray, num: int, draw: Draw) -> Lesson:
    order = draw.permutation(len(X))
    return Lesson(X[order[:num]], y[order[:num]], X[order[num:]], y[order[num:]])
