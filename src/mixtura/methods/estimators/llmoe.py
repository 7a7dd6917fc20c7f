"""LLMoE: a language model says whether things look well or badly, and an expert of that outlook trades."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.estimators import Passed, dense_routing, everyone, perceptron
from mixtura.methods.estimators._domains import GroupedRegressor, parted
from mixtura.methods.estimators._markets import OUTLOOKS, described, outlook

METHOD = {
    "paper": 67,
    "title": "LLM-Based Routing in Mixture of Experts: A Novel Framework for Trading",
    "tags": ["regresses", "tabular", "reads:groups"],
}


@final
class Llmoe(GroupedRegressor):
    """Trade by two experts, one for good prospects and one for bad, between which a language model chooses.

    Stocks, prices and news, routing by a language model. A row is a window of past returns, oldest first, and
    the target the next return. `prompts` writes each window in words, for any language model to answer with
    one word, "optimistic" or "pessimistic"; the answers are ``groups``. Each expert is a perceptron that
    learns the next return from the rows of its outlook alone. `positions` is all in (1) where a gain above
    ``cost`` is expected, and all out (0) otherwise. Without answers a rule decides: whether a window gained.

    Shapes:
        ``X [n, L]``, ``y [n]``, ``groups [n]``; ``route`` has one expert a row: optimistic, pessimistic.

    Raises:
        SettingError: ``cost`` is not in [0, 1], or a size, rate or ``random_state`` out of range.
        UserError: a number is missing, or an answer is neither of the two words.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> X = generator.normal(0, 0.01, size=(300, 8))
        >>> y = np.where(X.sum(1) > 0, X[:, -1], -X[:, -1])
        >>> model = Llmoe(epochs=20).fit(X, y)
        >>> model.prompts(X[:1], news=["Profits rose."])[0].splitlines()[-1]
        'Answer with one word, optimistic or pessimistic.'
        >>> bool(((model.positions(X) == 1) == (y > 0)).mean() > 0.85)
        True

    Differences from the paper:
        Which language model answers is the caller's choice, and its answers are given as labels, so that no
        model is loaded here; the rule without answers is ours. What experts are there is not said in the
        abstract: perceptrons. An outlook that no row of the training had is served by the other expert.

    Reference:
        LLM-Based Routing in Mixture of Experts: A Novel Framework for Trading (paper 67, abstract).
    """

    ranges: ClassVar = {"cost": (0, 1)}

    def __init__(
        self,
        *,
        d_hidden: int = 16,
        cost: float = 0.0,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.d_hidden = d_hidden
        self.cost = cost
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def prompts(self, X: Any, news: Any = None) -> list[str]:
        """Each window, and its news if any, as a question to a language model."""
        return described(np.asarray(X, dtype=np.float64), news)

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> Llmoe:
        """Learn the next return; ``groups`` are the language model's answers."""
        super().fit(X, y, outlook(self.fresh_rows(X)) if groups is None and y is not None else groups)
        return self

    def learn_groups(self, groups: Any, num_rows: int) -> np.ndarray:
        """The answers by number, optimistic 0 and pessimistic 1."""
        self.groups_ = np.array(OUTLOOKS)
        return self.numbers(groups, num_rows)

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """The return that the expert of each row's outlook expects."""
        return super().predict(X, outlook(self.rows(X)) if groups is None else groups)

    def route(self, X: Any, groups: Any = None) -> Any:
        return super().route(X, outlook(self.rows(X)) if groups is None else groups)

    def positions(self, X: Any, groups: Any = None) -> np.ndarray:
        """All in (1) or all out (0) for the period after each window."""
        said = self.predict(X, groups)
        if said.ndim != 1:
            raise UserError("Llmoe learned several numbers a row, of which none is the return; fit one")
        return (said > self.cost).astype(np.float64)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self.d_hidden)

    def prepare(self, module: Any, x: Tensor, target: Tensor) -> None:
        module.num_rows.copy_(torch.bincount(parted(x)[1], minlength=2))

    def loss(self, passed: Passed, target: Float[Tensor, "T O"], progress: float) -> Float[Tensor, ""]:
        return F.mse_loss(passed.output, target)


@final
class _Network(nn.Module):
    num_rows: Tensor

    def __init__(self, d_in: int, d_out: int, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(perceptron(d_in, width, width, d_out) for _ in OUTLOOKS)
        self.register_buffer("num_rows", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        rows, outlooks = parted(x)
        chosen = torch.where(self.num_rows[outlooks] > 0, outlooks, 1 - outlooks)
        weights = F.one_hot(chosen, 2).to(x.dtype)
        said = everyone(self.experts, rows)
        output = torch.einsum("te,eto->to", weights, said)
        return Passed(output=output, routing=dense_routing(weights, present=weights > 0), outputs=said)
