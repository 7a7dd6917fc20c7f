"""AIO-P: what a plan of blocks comes to, learned of one measure and carried to others by adapters."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import SettingError
from mixtura.methods.estimators import Network, Passed, Regressor, minimise, spread_of
from mixtura.methods.estimators._plans import (
    MeasuredPlan,
    PlanNetwork,
    agreement,
    joined,
    measures_of,
    missed,
)
from mixtura.methods.estimators._training import frozen

METHOD = {
    "paper": 203,
    "title": "AIO-P: Expanding Neural Performance Predictors Beyond Image Classification",
    "tags": ["regresses"],
}


@final
class AioP(Regressor, Network):
    """Predict what plans of joined blocks come to; few measurements of another kind suffice for it.

    Neural performance predictor, architecture search, transfer of a predictor: the loss or speed of a plan of
    bits or drops by block before it is measured. A graph network of the blocks learns the first measure.
    Then it is frozen, and an adapter for each further measure (another model, another device) learns beside
    it: layer by layer it reads what the base's layer made and its own state. `rank` is the mean over
    adapters, for a measure of which there is no number yet.

    Shapes:
        ``X [n, L * C]``: C features of each of ``num_nodes`` L blocks, a block's features together; ``y [n]``
        or ``[n, K]``, NaN where a plan was not measured, the first column the one with most. ``route`` gives
        the weights of the base and adapters in `rank`.

    Raises:
        SettingError: ``num_nodes`` does not divide the width of rows, ``edges`` name blocks that do not
            exist, ``num_layers`` is not in [1, 64], or a size, rate or ``random_state`` out of range.
        UserError: X has a missing number, or a measure was taken fewer than two times.

    Example:
        >>> X = np.random.default_rng(0).random((300, 6))
        >>> loss = (2.0 ** (-4 * X)).sum(1)
        >>> y = np.stack([loss, 3 + 2 * loss**2], axis=1)
        >>> y[20:, 1] = np.nan
        >>> model = AioP(epochs=40).fit(X, y)
        >>> bool(np.corrcoef(model.predict(X)[20:, 1], loss[20:] ** 2)[0, 1] > 0.9)
        True

    Differences from the paper:
        There graphs of operations of many shapes; here one graph of blocks with a learned vector a place, and
        layers of means over neighbours. Three layers in place of six; two in place of seven in a head. The
        paper's rescaling of an adapter's last layer for a task of another scale is not needed, as measures
        are standardised; its scaling by FLOPs is left out.

    Reference:
        AIO-P: Expanding Neural Performance Predictors Beyond Image Classification (paper 203);
        ``k_adapters.py`` in Ascend-Research/AIO-P.
    """

    ranges: ClassVar = {"num_nodes": (1, 1 << 16), "num_layers": (1, 64)}

    def __init__(
        self,
        *,
        num_nodes: int | None = None,
        edges: list[list[int]] | None = None,
        d_hidden: int = 16,
        num_layers: int = 3,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_nodes = num_nodes
        self.edges = edges
        self.d_hidden = d_hidden
        self.num_layers = num_layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> AioP:
        """Learn the first measure, then the others from what was learned of it."""
        self.check_settings()
        self.is_flat_ = y is None or self.targets(y).ndim < 2
        if self.is_flat_:
            X, y = self.lessons(X, y, y_numeric=True)
            values = y[:, None].astype(np.float64)
        else:
            X = self.fresh_rows(X)
            values = measures_of(y, len(X), "AioP")
        self.target_mean_, self.target_scale_ = np.nanmean(values, axis=0), spread_of(values)
        wanted = torch.from_numpy((values - self.target_mean_) / self.target_scale_)
        self.learn(X, wanted, wanted.shape[1])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Every measure, in the shape that was learned."""
        said: np.ndarray = self.output(X).numpy() * self.target_scale_ + self.target_mean_
        return said[:, 0] if self.is_flat_ else said

    def rank(self, X: Any) -> np.ndarray:
        """The mean of all adapters, standardised, for a measure of which nothing is known; larger is more."""
        said = self.output(X)
        found: np.ndarray = (said[:, 1:] if said.shape[1] > 1 else said).mean(1).numpy()
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination, the mean over measures where plans were measured."""
        said = self.predict(X).reshape(len(X), -1)
        return agreement(said, self.targets(y, said.shape), sample_weight)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        num = d_in if self.num_nodes is None else self.num_nodes
        if d_in % num:
            raise SettingError(f"num_nodes of AioP must divide the {d_in} columns of rows, got {num}")
        return MeasuredPlan(PlanNetwork(num, d_in // num, d_out, joined(self.edges, num), self))

    def loss(self, passed: Passed, target: Float[Tensor, "T K"], progress: float) -> Float[Tensor, ""]:
        return missed(passed.output[:, :1], target[:, :1])

    def finish(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, MeasuredPlan)
        frozen(module.children())
        module.plan.adapters.requires_grad_()
        if target.shape[1] > 1:
            rows = (~target[:, 1:].isnan()).any(1).nonzero()[:, 0]
            steps, rate = {"epochs": self.epochs, "batch_size": self.batch_size}, self.learning_rate

            def lost(part: Tensor, progress: float) -> Tensor:
                return missed(module(x[rows[part]]).output[:, 1:], target[rows[part], 1:])

            minimise(module.parameters(), lost, len(rows), learning_rate=rate, **steps)
        module.requires_grad_()
