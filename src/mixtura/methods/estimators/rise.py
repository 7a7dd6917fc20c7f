"""RISE: a checker of worked rows that learns from right ones with small errors put in."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods.estimators import minimise, seeded, spread_of
from mixtura.methods.estimators._checking import Checker
from mixtura.methods.estimators._edits import Editor, checked, line_of, pairs, preference

METHOD = {
    "paper": 153,
    "title": "Subtle Errors Matter: Preference Learning via Error-injected Self-editing",
    "tags": ["checks", "classifies", "tabular"],
}


@final
class Rise(Checker):
    """Tell right rows from subtly wrong ones, by preference learning on errors that are put in on purpose.

    Step checker, verifier, hard negatives, direct preference optimisation, error injection. Wrong examples
    at hand are mostly wrong all over, so that what learns of them overlooks a single wrong number. A mixture
    of experts learns the labels first. Then right rows are edited (another number, a number of the same row,
    another operator, two exchanged, one left out), without numbers that would be told by themselves, and a
    row is to be preferred to its edit as well as to a wrong row drawn, beside what the first network said
    (DPO). A line makes a probability of the score. `edit` gives such rows to others.

    Shapes:
        ``X [n, d]``, the numbers of a worked solution; ``y [n]`` of two classes, the greater one is right.
        ``route`` gives ``top_k`` experts a row.

    Raises:
        SettingError: ``edits`` or ``columns`` name what does not exist, ``num_edits`` is not in [0, 1024],
            ``beta`` in [1e-3, 1e3], ``size`` in [0, 1e3], or another is out of range.
        UserError: a number is missing, or there are not two classes.

    Example:
        >>> draw = np.random.default_rng(0)
        >>> X = draw.normal(size=(300, 2))
        >>> X = np.column_stack([X, X.sum(1)])
        >>> y = np.arange(300) < 200
        >>> X[~y, 2] = draw.normal(size=100) * 3
        >>> model = Rise(epochs=40).fit(X, y)
        >>> slightly = X[y] + np.array([0, 0, 0.5])
        >>> bool(model.predict_proba(slightly)[:, 1].mean() < model.predict_proba(X[y])[:, 1].mean() - 0.2)
        True

    Differences from the paper:
        There a language model edits its own solutions and is itself tuned; here rows are edited by program
        and a checker learns, whose score takes the place of a text's likelihood. The prefix before an edit
        is no longer common, since rows are read whole. ``num_edits`` of a right row, where the paper has one;
        steps and rates are those of small networks. What "related" and "deletion" put in is another number
        of the row, and 0. An edit is known to be wrong only where it changes the answer, which a table does
        not say: those that are a right row of the data are dropped. The line is ours.

    Reference:
        Subtle Errors Matter: Preference Learning via Error-injected Self-editing (paper 153, abstract);
        kaishxu/RISE.
    """

    ranges: ClassVar = {"top_k": (1, 4096), "num_edits": (0, 1024), "beta": (1e-3, 1e3), "size": (0, 1e3)}

    def __init__(
        self,
        *,
        edits: list[str] | None = None,
        columns: list[int] | None = None,
        num_edits: int = 8,
        size: float = 0.5,
        beta: float = 0.4,
        num_experts: int = 4,
        top_k: int = 2,
        d_hidden: int = 32,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.edits = edits
        self.columns = columns
        self.num_edits = num_edits
        self.size = size
        self.beta = beta
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_hidden = d_hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Rise:
        """Learn the labels, then that right rows are better than their edits and than wrong ones."""
        self.check_settings()
        X, y = self.lessons(X, y)
        self.classes_ = self.two_classes(y)
        self.mean_, self.scale_ = X.mean(0), spread_of(X)
        is_right = y == self.classes_[1]
        self.right_ = X[is_right]
        edits = [self._edited(self.right_, seed) for seed in range(self.num_edits)]
        self.rebuild()
        with seeded(self.random_state):
            self._learn(X, is_right, edits)
        return self

    def edit(self, X: Any, seed: int = 0) -> np.ndarray:
        """An edit of each row, by the values of the right rows learned; NaN where the one drawn is none.

        Raises:
            SettingError: ``edits`` or ``columns`` name what does not exist.
        """
        return self._edited(self.rows(X), seed)

    def _edited(self, rows: np.ndarray, seed: int) -> np.ndarray:
        kinds = checked(self.edits, self.columns, rows.shape[1])
        check_range("edit", "seed", seed, 0, 1 << 31)
        draw = np.random.default_rng([self.random_state, seed])
        made, good = Editor(self.right_, self.size, self.columns).edit(rows, kinds, draw)
        return np.where(good[:, None], made, np.nan)

    def _learn(self, X: np.ndarray, is_right: np.ndarray, edits: list[np.ndarray]) -> None:
        how: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch_size}
        how["learning_rate"] = self.learning_rate
        x, target = self.given(X), torch.from_numpy(is_right.astype(int))
        weights = list(self.module_.parameters())
        minimise(weights, lambda b, _: F.cross_entropy(self.module_(x[b]).output, target[b]), len(x), **how)
        better, worse = pairs(self.given(self.right_), x[target == 0], [self.given(one) for one in edits])
        with torch.no_grad():
            start = self.score_of(better) - self.score_of(worse)

        def lost(rows: Tensor, progress: float) -> Tensor:
            ahead = self.score_of(better[rows]) - self.score_of(worse[rows])
            return preference(ahead, start[rows], self.beta)

        minimise(weights, lost, len(better), **how)
        with torch.no_grad():
            self.line_ = line_of(self.score_of(better), self.score_of(worse))
