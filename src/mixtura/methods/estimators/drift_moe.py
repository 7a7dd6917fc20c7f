"""DriftMoE: a stream's classifier, whose router learns online which expert is right on which rows."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch

from mixtura.errors import UserError
from mixtura.methods.estimators import Classifier, dense_routing, perceptron, seeded
from mixtura.methods.estimators._streams import Moments, NaiveBayes, step_down, wanted_experts
from mixtura.types import Routing

METHOD = {
    "paper": 210,
    "title": "DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts",
    "tags": ["classifies", "streams", "tabular"],
}


@final
class DriftMoe(Classifier):
    """Classify rows of a stream that drifts, by experts that specialise because a router chooses who learns.

    Online, incremental learning under concept drift; ``partial_fit`` in the order of time. Of each small
    batch first the router learns: its targets are the experts that are right on a row, or the one that gave
    the class most where none is. Then each row is learned by the router's ``top_k`` experts. The router's
    best expert predicts.

    Shapes:
        ``X [n, d]``, ``y [n]``; ``route`` gives the softmax of the router over all experts.

    Raises:
        SettingError: ``top_k`` is not in [1, ``num_experts``], ``forget`` in [0.5, 1], ``rate`` in [0, 1e3],
            or another is out of range.
        UserError: a number is missing, there is one class alone, or a later batch has a class that the first
            did not name (``classes=``).

    Example:
        >>> X = np.random.default_rng(0).normal(size=(600, 2))
        >>> y = (X[:, 0] > 0).astype(int)
        >>> y[300:] = 1 - y[300:]
        >>> model = DriftMoe(forget=0.99).partial_fit(X[:300], y[:300], classes=[0, 1])
        >>> before = model.score(X[:300], y[:300])
        >>> bool(before > 0.8), bool(model.partial_fit(X[300:], y[300:]).score(X[300:], y[300:]) > 0.8)
        (True, True)

    Differences from the paper:
        Experts are naive Bayes classifiers that forget (``forget`` a row), in place of Hoeffding trees, whose
        libraries have no form that is safe to save; the mode with an expert a class is left out. The router
        has no dropout, and takes plain steps in place of Adam's, so that all that it remembers is its
        weights.

    Reference:
        DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts (paper 210); miguel-ceadar/drift-moe.
    """

    ranges: ClassVar = {"top_k": (1, 4096), "forget": (0.5, 1), "rate": (0, 1e3)}

    def __init__(
        self,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        d_hidden: int = 32,
        forget: float = 0.999,
        rate: float = 0.1,
        batch_size: int = 8,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_hidden = d_hidden
        self.forget = forget
        self.rate = rate
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> DriftMoe:
        """Forget everything, and learn of rows in their order."""
        if hasattr(self, "counts_"):
            del self.counts_
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> DriftMoe:
        """Learn of more rows in their order; the first time ``classes`` names all that may come."""
        self.check_settings()
        first = not hasattr(self, "counts_")
        X, y = self.lessons(X, y, reset=first, ensure_min_samples=1)
        if first:
            with self.in_words():
                named = y if classes is None else np.asarray(classes)
            self._begin(self.classes_of(named))
        if not np.isin(y, self.classes_).all():
            strange = next(one for one in y.tolist() if one not in self.classes_)
            raise UserError(f"class {strange!r} was not among the classes that DriftMoe began with; fit anew")
        numbers = np.searchsorted(self.classes_, y)
        for start in range(0, len(X), self.batch_size):
            self._learn(X[start : start + self.batch_size], numbers[start : start + self.batch_size])
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """What the router's best expert says of each row."""
        X = self.rows(X)
        best = self._logits(X).argmax(1).numpy()
        said: np.ndarray = self._experts().probabilities(X)[best, np.arange(len(X))]
        return said

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every row."""
        return self.most_probable(self.predict_proba(X))

    def route(self, X: Any) -> Routing:
        logits = self._logits(self.rows(X))
        return dense_routing(logits.softmax(-1), logits)

    def rebuild(self) -> None:
        sizes = (self.n_features_in_, self.d_hidden, max(1, self.d_hidden // 2), self.num_experts)
        with seeded(self.random_state):
            self.module_ = perceptron(*sizes).double()

    def _begin(self, classes: np.ndarray) -> None:
        self.classes_ = classes
        shape = (self.num_experts, len(classes))
        self.counts_ = np.zeros(shape)
        self.means_, self.spreads_ = (np.zeros((*shape, self.n_features_in_)) for _ in range(2))
        self.seen_ = np.zeros((3, self.n_features_in_))
        self.rebuild()

    def _experts(self) -> NaiveBayes:
        return NaiveBayes(self.counts_, self.means_, self.spreads_, Moments(self.seen_))

    def _logits(self, X: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.module_(torch.from_numpy(Moments(self.seen_).standardised(X)))
        return logits

    def _learn(self, X: np.ndarray, numbers: np.ndarray) -> None:
        Moments(self.seen_).add(X)
        wanted = torch.from_numpy(wanted_experts(self._experts().probabilities(X), numbers))
        x = torch.from_numpy(Moments(self.seen_).standardised(X))
        logits = step_down(self.module_, x, wanted, self.rate)
        chosen = logits.topk(min(self.top_k, self.num_experts), dim=1).indices.numpy()
        self._experts().add(X, numbers, chosen, self.forget)
