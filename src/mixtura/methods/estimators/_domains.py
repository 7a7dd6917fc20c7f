"""Rows of several domains, languages, tasks or environments: estimators that are told each row's group."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor

from mixtura.errors import UnknownNameError, UserError
from mixtura.methods.estimators._tables import Network, NetworkClassifier, NetworkRegressor
from mixtura.types import Routing


class Grouped(Network, ABC):
    """A network that is told each row's group: a domain, a task, a language, by any labels."""

    grouped: ClassVar[bool] = True

    def learn_groups(self, groups: Any, num_rows: int) -> np.ndarray:
        """Keep the labels of groups in ``groups_``, ascending; return each row's number."""
        if groups is None:
            groups = np.zeros(num_rows, dtype=np.int64)
        self.groups_ = np.unique(self._labels(groups, num_rows))
        return self.numbers(groups, num_rows)

    def numbers(self, groups: Any, num_rows: int) -> np.ndarray:
        """The number of each row's group; without groups, 0 where there is one alone, else -1.

        Raises:
            UserError: there are not as many labels as rows, or one was not learned of.
        """
        if groups is None:
            return np.full(num_rows, 0 if len(self.groups_) == 1 else -1)
        known, labels = self.groups_, self._labels(groups, num_rows)
        if (known.dtype.kind == "U") != (labels.dtype.kind == "U"):
            known, labels = known.astype(str), labels.astype(str)
        # As text 10 comes before 2.
        order = np.argsort(known)
        found = order[np.searchsorted(known, labels, sorter=order).clip(max=len(known) - 1)]
        strange = labels[known[found] != labels]
        if len(strange):
            raise UnknownNameError("group", str(strange[0]), [str(one) for one in self.groups_.tolist()])
        numbers: np.ndarray = found
        return numbers

    def route(self, X: Any, groups: Any = None) -> Routing:
        """Which expert is given which row, with what weight."""
        X = self.rows(X)
        return self.run_of(X, self.numbers(groups, len(X))).routing

    def _labels(self, groups: Any, num_rows: int) -> np.ndarray:
        labels = self.labels(groups)
        if labels.shape != (num_rows,):
            name = type(self).__name__
            raise UserError(
                f"groups of {name} must be one label a row, {num_rows} in all, got {labels.shape}"
            )
        listed = labels.tolist()
        if labels.dtype.kind in "fO" and any(map(_is_missing, listed)):
            raise UserError(
                f"groups of {type(self).__name__} have a label that is not finite or missing; give it a name"
            )
        if labels.dtype.kind != "O":
            return labels
        # What they are, so that numbers in a column of objects are those that were learned as numbers.
        plain = np.array(listed) if not any(isinstance(one, Iterable) for one in listed) else labels
        return labels.astype(str) if plain.dtype.kind in "OMm" else plain


def _is_missing(label: Any) -> bool:
    try:
        return label is None or label in (np.inf, -np.inf) or bool(label != label)
    except TypeError:
        # The NA of pandas is neither equal to itself nor not.
        return True


class GroupedClassifier(Grouped, NetworkClassifier, ABC):
    """A classifier that is told each row's group."""

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> GroupedClassifier:
        """Learn classes of rows, each of a group; without groups all rows are of one."""
        self.check_settings()
        X, y = self.lessons(X, y)
        self.classes_ = self.classes_of(y)
        numbers = self.learn_groups(groups, len(X))
        self.learn(X, torch.from_numpy(np.searchsorted(self.classes_, y)), len(self.classes_), numbers)
        return self

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """The probability of every class, in the order of ``classes_``."""
        X = self.rows(X)
        shares: np.ndarray = self.output_of(X, self.numbers(groups, len(X))).softmax(-1).numpy()
        return shares

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """The most probable class of every row."""
        return self.most_probable(self.predict_proba(X, groups))

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The share of rows, each of its group, whose class is right.

        Raises:
            UserError: labels are not one class a row, such as was learned, or a group was not learned of.
        """
        with self.in_words():
            return float(accuracy_score(y, self.predict(X, groups), sample_weight=sample_weight))


class GroupedRegressor(Grouped, NetworkRegressor, ABC):
    """A regressor that is told each row's group."""

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> GroupedRegressor:
        """Learn numbers of rows, each of a group; without groups all rows are of one."""
        self.check_settings()
        X, y = self.lessons(X, y, multi_output=True, y_numeric=True)
        wanted = self.scaled(y)
        self.learn(X, wanted, wanted.shape[1], self.learn_groups(groups, len(X)))
        return self

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """The expected numbers of every row, in the shape that was learned."""
        X = self.rows(X)
        return self.unscaled(self.output_of(X, self.numbers(groups, len(X))))

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The share of the targets' variance that is explained, by rows each of its group.

        Raises:
            UserError: targets are no numbers, or others than was learned, or a group was not learned of.
        """
        with self.in_words():
            return float(r2_score(y, self.predict(X, groups), sample_weight=sample_weight))


def parted(x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T _"], Int[Tensor, " T"]]:
    """Rows, and the numbers of their groups, of what a network is given."""
    return x[:, :-1], x[:, -1].long()
