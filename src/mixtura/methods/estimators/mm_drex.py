"""MM-DREX: a router weighs four traders by regime, taught by labels, then by the Sharpe ratio."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import Network, Passed, dense_routing, perceptron
from mixtura.methods.estimators._markets import log_wealth, regimes, rule_positions

METHOD = {
    "paper": 68,
    "title": "MM-DREX: Multimodal-Driven Dynamic Routing of LLM Experts for Financial Trading",
    "tags": ["regresses", "tabular"],
}


@final
class MmDrex(Network):
    """Trade by trend, reversal, breakout and positioning at once, weighed by what regime the market is in.

    A row is a window of past returns, oldest first, and the target the next return. Four traders are rules:
    go with the trend, against the last move, in at a new high, or in always but less when it swings more. A
    router reads the window and weighs them. In the first ``supervised`` of the epochs it learns to name the
    regime that a window shows, by rules; then it maximises the Sharpe ratio of what the weighed positions
    earn, batch by batch.

    Shapes:
        ``X [n, L]``, ``y [n]``; ``predict`` gives the part of the money to put in, in [0, 1]; ``route`` gives
        the weights of trend, reversal, breakout, positioning.

    Raises:
        SettingError: ``supervised`` is not in [0, 1], ``cost`` in [0, 1], or a size, rate or ``random_state``
            out of range.
        UserError: a number is missing, or there are several targets a row.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> X = generator.normal(0, 0.01, size=(400, 10))
        >>> y = np.where(X[:, -1] < X.mean(1), 0.01, -0.01)
        >>> model = MmDrex(epochs=20).fit(X, y)
        >>> model.route(X).scores.mean(0).argmax().item(), bool(model.score(X, y) > 1)
        (1, True)

    Differences from the paper:
        Windows of returns in place of candlestick charts and texts, a perceptron in place of a model of
        vision and language, and rules in place of four language models that are trained too; regimes are
        labelled by rules, too. The second phase follows the gradient of the batch's Sharpe ratio itself, as
        weights are continuous; the paper trains by reinforcement. No short positions.

    Reference:
        MM-DREX: Multimodal-Driven Dynamic Routing of LLM Experts for Financial Trading (Chen and others,
        2025, arXiv 2509.05080; paper 68). Its abstract was read, the paper was not.
    """

    ranges: ClassVar = {"supervised": (0, 1), "cost": (0, 1)}

    def __init__(
        self,
        *,
        supervised: float = 0.5,
        d_hidden: int = 16,
        cost: float = 0.0,
        epochs: int = 40,
        batch_size: int = 128,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.supervised = supervised
        self.d_hidden = d_hidden
        self.cost = cost
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> MmDrex:
        self.check_settings()
        X, y = self.lessons(X, y, y_numeric=True)
        self.usual_ = float(np.median(X.std(1)))
        self.learn(X, torch.from_numpy(y.astype(np.float64)), 4)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """What part of the money to put in for the period after each window."""
        passed = self.run(X)
        made: np.ndarray = (passed.output * passed.more).sum(1).numpy()
        return made

    def score(self, X: Any, y: Any) -> float:
        """The logarithm of the wealth that 1 becomes over the rows, in their order, after costs."""
        said = self.predict(X)
        return log_wealth(said, self.in_reach(self.targets(y, said.shape), "y"), self.cost)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(self)

    def loss(self, passed: Passed, target: Float[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        weights, positions, labels = passed.output, passed.more, passed.outputs
        if progress < self.supervised:
            return F.cross_entropy(passed.routing.logits, labels[0, :, 0].long())  # type: ignore[index]
        earned = (weights * positions).sum(1) * target
        ratio: Tensor = earned.mean() / (earned.std(correction=0) + 1e-9)
        return -ratio


@final
class _Network(nn.Module):
    mean: Tensor
    scale: Tensor
    usual: Tensor

    def __init__(self, owner: MmDrex) -> None:
        super().__init__()
        width = owner.d_hidden
        # The rules read returns as they are, not standardised.
        self.register_buffer("mean", torch.from_numpy(owner.mean_))
        self.register_buffer("scale", torch.from_numpy(owner.scale_))
        self.register_buffer("usual", torch.tensor(owner.usual_, dtype=torch.float64))
        self.gate = perceptron(len(owner.mean_), width, width, 4)

    def forward(self, x: Float[Tensor, "T L"]) -> Passed:
        plain = x * self.scale + self.mean
        logits = self.gate(x)
        weights = logits.softmax(-1)
        labels = regimes(plain).to(x.dtype)[None, :, None]
        positions = rule_positions(plain, self.usual)
        return Passed(output=weights, routing=dense_routing(weights, logits), outputs=labels, more=positions)
