"""MVec: rows by what they have mastered, in clusters that are found, and as many drawn of each."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from sklearn.base import ClusterMixin
from sklearn.utils.validation import check_is_fitted

from mixtura.methods.estimators import Estimator, one_each, seeded
from mixtura.methods.estimators._base import number_of
from mixtura.methods.estimators._walks import even_draw, kinds_of, refined, vectors, walks
from mixtura.types import Routing

METHOD = {
    "paper": 158,
    "title": "Scalable and Equitable Math Problem Solving Strategy Prediction in Big Educational Data",
    "tags": ["clusters"],
}


@final
class MasterySampler(ClusterMixin, Estimator):
    """Draw a few rows that stand evenly for all kinds of rows, so that what learns them is fair to each.

    Training or calibrating on a small even sample, undersampling, node2vec, non-parametric clustering:
    students by the skills they mastered, texts by what models get right. Rows and columns are a graph, whose
    edges are how much a row has of a column; biased random walks give columns vectors, and a row is the mean
    of those of its columns. Clusters are found coarse to fine: where rows of a cluster do not mostly have the
    same label, it is cut up. `fit_resample` draws from all clusters in turns.

    Shapes:
        ``X [n, d]``, ``y [n]`` any labels, or none; `fit_resample` gives rows and labels ``[num]``.
        ``predict`` and ``route`` give the cluster of the nearest centre.

    Raises:
        SettingError: ``num_rows`` is not in [1, 1e9], ``wide`` or ``alike`` in [0, 1], ``levels`` in [1, 64],
            ``back`` or ``away`` in [1e-6, 1e6], or a size, rate or ``random_state`` out of range.
        UserError: a number is missing, or labels are not as many as rows.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> kind = np.repeat([0, 1], [190, 10])
        >>> X = generator.random((200, 6)) * 0.1 + np.kron(np.eye(2), np.ones(3))[kind]
        >>> model = MasterySampler(num_rows=20)
        >>> drawn, labels = model.fit_resample(X, kind)
        >>> drawn.shape, bool(labels.sum() >= 5)
        ((20, 6), True)

    Differences from the paper:
        Only the abstract and a summary were at hand. There strategies of students come from a transformer of
        their steps, and an LSTM learns the sample; here columns are skills, and what learns is any other
        estimator. A row's vector is the mean of its columns' vectors, so that new rows have one; columns
        count from their least value. Widths are a share of the widest distance from the mean, half as wide on
        each level; "approximately symmetrical" is a share ``alike`` of one label.

    Reference:
        Scalable and Equitable Math Problem Solving Strategy Prediction in Big Educational Data (paper 158,
        abstract).
    """

    ranges: ClassVar = {
        "num_rows": (1, 1e9), "wide": (0, 1), "alike": (0, 1), "levels": (1, 64), "back": (1e-6, 1e6),
        "away": (1e-6, 1e6), "length": (2, 4096), "each": (1, 4096), "reach": (1, 4096),
    }  # fmt: skip

    def __init__(
        self,
        *,
        num_rows: int = 100,
        d_hidden: int = 16,
        wide: float = 0.5,
        alike: float = 0.8,
        levels: int = 3,
        length: int = 10,
        each: int = 10,
        reach: int = 2,
        back: float = 1.0,
        away: float = 1.0,
        epochs: int = 5,
        learning_rate: float = 0.02,
        random_state: int = 0,
    ) -> None:
        self.num_rows = num_rows
        self.d_hidden = d_hidden
        self.wide = wide
        self.alike = alike
        self.levels = levels
        self.length = length
        self.each = each
        self.reach = reach
        self.back = back
        self.away = away
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> MasterySampler:
        """Find the clusters of rows."""
        self.check_settings()
        X = self.fresh_rows(X)
        kinds = np.zeros(len(X), int) if y is None else kinds_of(self.labels(y), len(X))
        self.least_, self.most_ = X.min(0), np.ptp(X, axis=0)
        weights, generator = self._weights(X), np.random.default_rng(self.random_state)
        paths = walks(weights, self.length, self.each, self.back, self.away, generator)
        with seeded(self.random_state):
            how = (self.d_hidden, self.reach, self.epochs, self.learning_rate)
            self.vectors_ = vectors(paths, X.shape[1], *how)
        rows = weights @ self.vectors_
        furthest = float(np.sqrt(((rows - rows.mean(0)) ** 2).sum(1)).max())
        self.labels_ = refined(rows, kinds, self.wide * furthest, self.alike, self.levels)
        groups = range(self.labels_.max() + 1)
        self.centres_ = np.stack([rows[self.labels_ == one].mean(0) for one in groups])
        return self

    def fit_resample(self, X: Any, y: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Find the clusters, and draw ``num_rows`` rows with their labels, if any, evenly of them, or all."""
        rows = self.fit(X, y).draw(self.num_rows)
        return np.asarray(X)[rows], None if y is None else np.asarray(y)[rows]

    def draw(self, num: int) -> np.ndarray:
        """The numbers of so many of the rows that were learned, evenly of the clusters."""
        check_is_fitted(self)
        num = number_of("draw", "num", num, 10**9)
        return even_draw(self.labels_, num, np.random.default_rng(self.random_state))

    def predict(self, X: Any) -> np.ndarray:
        """The cluster of every row."""
        nearest: np.ndarray = self._apart(X).argmin(1)
        return nearest

    def route(self, X: Any) -> Routing:
        apart = torch.from_numpy(self._apart(X))
        return one_each(apart.argmin(1), (-apart).softmax(1), -apart)

    def _apart(self, X: Any) -> np.ndarray:
        rows = self._weights(self.rows(X)) @ self.vectors_
        squares: np.ndarray = ((rows[:, None] - self.centres_) ** 2).sum(-1)
        return squares

    def _weights(self, X: np.ndarray) -> np.ndarray:
        """How much of each column a row has, in all one; even where it has none."""
        above = np.clip((X - self.least_) / np.where(self.most_ > 0, self.most_, 1), 0, None) + 1e-9
        weights: np.ndarray = above / above.sum(1, keepdims=True)
        return weights
