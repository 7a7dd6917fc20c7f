"""LESA: what comes next is a straight line and a learned bend, by other experts early and late."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from mixtura.methods.estimators import Regressor, minimise, one_each, seeded, spread_of
from mixtura.methods.estimators._kan import StagedForecast
from mixtura.types import Routing

METHOD = {
    "paper": 200,
    "title": "LESA: Learnable Stage-Aware Predictors for Diffusion Model Acceleration",
    "tags": ["regresses", "forecasts"],
}


@final
class Lesa(Regressor):
    """Forecast step by step: the last values go straight on, bent by an expert of the stage they are at.

    Feature forecasting for cached diffusion steps, Kolmogorov-Arnold networks, multi-step forecasting. A step
    is the linear extrapolation of the last two values plus what a network of curves (splines) makes of the
    last ``reads`` values and of how many steps ago the last known one was. The horizon is cut into
    ``num_experts`` stages, each with its own network. They first learn with true values before each step,
    then on their own forecasts, as they are used.

    Shapes:
        ``X [n, L]`` with ``L`` of 2 or more for a straight line, oldest first; ``y [n, H]`` or ``[n]``.
        ``route`` has a token for every row and step, steps of a row together.

    Raises:
        SettingError: ``reads`` is not in [1, 65536], ``closed_epochs`` in [0, 1048576], or a size, rate or
            ``random_state`` is out of range.
        UserError: a number is missing, or there are too few rows.

    Example:
        >>> from mixtura.methods.estimators import windows
        >>> X, y = windows(np.sin(np.arange(220) / 5), past=8, future=6)
        >>> model = Lesa(epochs=10).fit(X[:150], y[:150])
        >>> bool(model.score(X[150:], y[150:]) > 0.9), model.route(X[:2]).load.tolist()
        (True, [4, 4, 4])

    Differences from the paper:
        Only the abstract and a summary were at hand. There features of a diffusion transformer are forecast
        over skipped denoising steps, stages are noise levels; here values of a series, stages are equal
        parts of the horizon. Two layers of cubic splines on five cells within three deviations, three stages,
        the straight line beneath them and Adam are our choices.

    Reference:
        LESA: Learnable Stage-Aware Predictors for Diffusion Model Acceleration (paper 200, abstract).
    """

    ranges: ClassVar = {"reads": (1, 1 << 16), "closed_epochs": (0, 1 << 20)}

    def __init__(
        self,
        *,
        num_experts: int = 3,
        reads: int = 3,
        d_hidden: int = 8,
        epochs: int = 20,
        closed_epochs: int = 20,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.reads = reads
        self.d_hidden = d_hidden
        self.epochs = epochs
        self.closed_epochs = closed_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Lesa:
        """Learn what follows windows of the past."""
        self.check_settings()
        X, y = self.lessons(X, y, multi_output=True, y_numeric=True)
        self.is_flat_, future = y.ndim == 1, y.reshape(len(y), -1).astype(np.float64)
        self.mean_, self.scale_ = float(X.mean()), float(spread_of(X.reshape(-1, 1))[0])
        self.num_outputs_ = future.shape[1]
        x, wanted = (torch.from_numpy((part - self.mean_) / self.scale_) for part in (X, future))
        self.rebuild()
        with seeded(self.random_state):
            for is_closed, epochs in ((False, self.epochs), (True, self.closed_epochs)):
                self._learn(x, wanted, is_closed, epochs)
        return self

    def _learn(self, x: Tensor, wanted: Tensor, is_closed: bool, epochs: int) -> None:
        def lost(rows: Tensor, progress: float) -> Tensor:
            known = None if is_closed else wanted[rows]
            missed: Tensor = (self.module_(x[rows], known) - wanted[rows]).square().mean()
            return missed

        if epochs:
            steps = {"epochs": epochs, "batch_size": self.batch_size}
            minimise(self.module_.parameters(), lost, len(x), learning_rate=self.learning_rate, **steps)

    def predict(self, X: Any) -> np.ndarray:
        """The steps that come, each from the forecasts before it."""
        x = torch.from_numpy((self.rows(X) - self.mean_) / self.scale_)
        with torch.no_grad():
            said: np.ndarray = self.module_(x).numpy() * self.scale_ + self.mean_
        return said[:, 0] if self.is_flat_ else said

    def route(self, X: Any) -> Routing:
        num = len(self.rows(X))
        stages = torch.tensor(self.module_.stages).repeat(num)
        scores = nn.functional.one_hot(stages, self.num_experts).double()
        return one_each(stages, scores)

    def rebuild(self) -> None:
        with seeded(self.random_state):
            self.module_ = StagedForecast(self.num_outputs_, self).double()
