"""SciPredict's questions of a classifier: how sure it may be, and when an experiment is needed instead."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.estimators import Classifier, Passed, minimise, seeded, spread_of
from mixtura.methods.estimators._confidence import MixedNetwork, held_out, monotone, reliability, restated
from mixtura.types import Routing

METHOD = {
    "paper": 205,
    "title": "SciPredict: Can LLMs Predict the Outcomes of Scientific Experiments in Natural Sciences?",
    "tags": ["classifies", "tabular"],
}


@final
class OutcomeForecaster(Classifier):
    """Predict outcomes with a confidence that means how often it is right, and say which to measure instead.

    Calibration, selective prediction, abstention, expected calibration error: which of two plans will do
    better, which experiment need not be run. A mixture of experts learns a part of the rows. On the part
    that was held out it is counted how often it is right, by how sure it says to be; an isotonic curve of
    that replaces its confidence, so that more confidence never means less. `abstains` names the rows below
    ``sure``; `report` says what predictions are worth, as the paper asks: right how often, in all and where
    it is sure, and how far confidence is from that.

    Shapes:
        ``X [n, d]``, ``y [n]``; of two plans, a row may be the difference of their features and ``y`` whether
        the first did better. ``route`` gives ``top_k`` experts a row.

    Raises:
        SettingError: ``held`` is not in [0, 0.9], ``sure`` in [0, 1], ``top_k`` in [1, ``num_experts``], or a
            size, rate or ``random_state`` out of range.
        UserError: a number is missing, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = OutcomeForecaster(epochs=30).fit(X, y)
        >>> found = model.report(X, y)
        >>> sorted(found), bool(found["accuracy where sure"] > 0.95)
        (['accuracy', 'accuracy where sure', 'calibration error', 'share sure'], True)

    Differences from the paper:
        The paper is a benchmark of 405 questions to language models and people, and finds accuracies of 14 to
        26 % that do not rise with a model's confidence; it proposes no predictor. This is ours, of tables,
        for the two questions it asks. Ten bins in the calibration error are our choice.

    Reference:
        SciPredict: Can LLMs Predict the Outcomes of Scientific Experiments in Natural Sciences? (paper 205,
        abstract).
    """

    ranges: ClassVar = {"held": (0, 0.9), "sure": (0, 1), "top_k": (1, 4096)}

    def __init__(
        self,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        d_hidden: int = 32,
        held: float = 0.3,
        sure: float = 0.8,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_hidden = d_hidden
        self.held = held
        self.sure = sure
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> OutcomeForecaster:
        """Learn outcomes of a part of the rows, and of the rest how sure to be."""
        self.check_settings()
        X, y = self.lessons(X, y)
        self.classes_ = self.classes_of(y)
        self.mean_, self.scale_ = X.mean(0), spread_of(X)
        numbers = np.searchsorted(self.classes_, y)
        aside = held_out(numbers, self.held, self.random_state)
        x, target = torch.from_numpy((X - self.mean_) / self.scale_), torch.from_numpy(numbers)
        mine, theirs = x[torch.from_numpy(~aside)], target[torch.from_numpy(~aside)]
        self.rebuild()
        steps, rate = {"epochs": self.epochs, "batch_size": self.batch_size}, self.learning_rate
        with seeded(self.random_state):

            def lost(rows: Tensor, progress: float) -> Tensor:
                return F.cross_entropy(self.module_(mine[rows]).output, theirs[rows])

            minimise(self.module_.parameters(), lost, len(mine), learning_rate=rate, **steps)
        with torch.no_grad():
            raw = self.module_(x[torch.from_numpy(aside)]).output.softmax(-1).numpy()
        self.curve_ = monotone(raw.max(1, initial=0), raw.argmax(1) == numbers[aside])
        return self

    def raw_proba(self, X: Any) -> np.ndarray:
        """The probabilities that the network says, before they are held against outcomes."""
        said: np.ndarray = self._passed(X).output.softmax(-1).numpy()
        return said

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of every class: the likeliest has how often such are right."""
        return restated(self.raw_proba(X), self.curve_)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest outcome of every row."""
        return self.most_probable(self.predict_proba(X))

    def abstains(self, X: Any) -> np.ndarray:
        """Whether a row's outcome should be measured, since the forecast is less than ``sure``."""
        unsure: np.ndarray = self.predict_proba(X).max(1) < self.sure
        return unsure

    def report(self, X: Any, y: Any) -> dict[str, float]:
        """What forecasts of known outcomes are worth; NaN where there is none to judge."""
        shares, outcomes = self.predict_proba(X), self.labels(y)
        if outcomes.shape != shares.shape[:1]:
            raise UserError(f"y of OutcomeForecaster is {len(shares)} outcomes, got {outcomes.shape}")
        return reliability(shares.max(1), self.most_probable(shares) == outcomes, self.sure)

    def route(self, X: Any) -> Routing:
        return self._passed(X).routing

    @torch.no_grad()
    def _passed(self, X: Any) -> Passed:
        rows = self.rows(X)
        found: Passed = self.module_(torch.from_numpy((rows - self.mean_) / self.scale_))
        return found

    def rebuild(self) -> None:
        with seeded(self.random_state):
            self.module_ = MixedNetwork(self.n_features_in_, len(self.classes_), self).double()
        self.module_.eval()
