"""Universal portfolio: money divided among strategies by what each has earned so far."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float

from mixtura.errors import UserError
from mixtura.methods.estimators import Estimator, dense_routing
from mixtura.types import Routing

METHOD = {
    "paper": 145,
    "title": (
        "Ensembling Portfolio Strategies for Long-Term Investments: A Distribution-Free Preference Framework "
        "for Decision-Making and Algorithms"
    ),
    "tags": ["invests", "streams"],
}


@final
class UniversalPortfolio(Estimator):
    """Invest as a mixture of strategies in which each weighs what it has earned: nobody need be believed.

    Online portfolio selection, wealth-weighted ensembles, Cover's universal portfolio. Strategies are each
    asset held alone, all of them in equal parts made even again every period, and ``num_mixed`` portfolios
    that are kept constant, drawn evenly. With ``power`` 1 the mixture's wealth is the mean of the strategies'
    wealths, whatever prices do; so it is at least the best one's over their number.

    Shapes:
        ``X [T, d]``, each row how many times an asset's price of the period before it ends with; ``predict``
        gives the portfolio of every period of ``X``, each from earlier rows alone, ``[T, d]``; ``route`` the
        weights of strategies.

    Raises:
        SettingError: ``num_mixed`` is not in [0, 65536], ``power`` in [0, 100], or ``random_state`` out of
        range.
        UserError: growths are missing or not above zero, or of another number of assets.

    Example:
        >>> X = np.array([[1.0, 2.0], [1.0, 0.5]] * 10)
        >>> model = UniversalPortfolio(num_mixed=50)
        >>> bool(model.score(X) > 1.5 * X.prod(0).max())
        True

    Differences from the paper:
        Only a summary of the paper was at hand. Weights are Cover's, wealth to a ``power``: 1 is the mean of
        wealths; more is our reading of an accelerated mixture, for which the bound does not hold. The
        infinite family of constant portfolios is a random sample of it. Costs of trading are left out.

    Reference:
        Ensembling Portfolio Strategies for Long-Term Investments: A Distribution-Free Preference Framework
        for Decision-Making and Algorithms (paper 145, abstract).
    """

    ranges: ClassVar = {"num_mixed": (0, 1 << 16), "power": (0, 100)}

    def __init__(self, *, num_mixed: int = 100, power: float = 1.0, random_state: int = 0) -> None:
        self.num_mixed = num_mixed
        self.power = power
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> UniversalPortfolio:
        """Forget everything, and let strategies earn over these periods."""
        if hasattr(self, "wealth_logs_"):
            del self.wealth_logs_
        return self.partial_fit(X)

    def partial_fit(self, X: Any, y: Any = None) -> UniversalPortfolio:
        """Let strategies earn over more periods."""
        self.check_settings()
        growth = self._growth(self.rows(X) if hasattr(self, "wealth_logs_") else self._begin(X))
        self.wealth_logs_ += np.log(self._earned(growth)).sum(0)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """How money is divided among assets in each period, from what was learned and the rows before it."""
        portfolios: np.ndarray = self._weights(X) @ self.strategies_
        return portfolios

    def score(self, X: Any, y: Any = None) -> float:
        """What one unit of money becomes over these periods, beginning without experience."""
        fresh = UniversalPortfolio(**self.get_params())
        growth = fresh._growth(fresh.fresh_rows(X, least=1))
        fresh = UniversalPortfolio(**self.get_params()).fit(np.ones_like(growth)[:1])
        return float((fresh.predict(growth) * growth).sum(1).prod())

    def route(self, X: Any) -> Routing:
        weights = torch.from_numpy(self._weights(X))
        return dense_routing(weights, weights.log())

    def _begin(self, X: Any) -> np.ndarray:
        rows = self.fresh_rows(X, least=1)
        num = rows.shape[1]
        generator = np.random.default_rng(self.random_state)
        mixed = generator.dirichlet(np.ones(num), self.num_mixed)
        self.strategies_ = np.concatenate([np.eye(num), np.full((1, num), 1 / num), mixed])
        self.wealth_logs_: np.ndarray = np.zeros(len(self.strategies_))
        return rows

    def _growth(self, rows: np.ndarray) -> Float[np.ndarray, "T D"]:
        if not (rows > 0).all():
            raise UserError(
                "X of UniversalPortfolio holds growths of prices, which are above 0, got "
                f"{rows.min():g}; divide each price by the one before it"
            )
        return rows

    def _earned(self, growth: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T M"]:
        """What every strategy makes of one unit in each period."""
        made: np.ndarray = growth @ self.strategies_.T
        return made

    def _weights(self, X: Any) -> Float[np.ndarray, "T M"]:
        """The share of money of every strategy before each period."""
        rows = self._growth(self.rows(X))
        logs = np.log(self._earned(rows)).cumsum(0) + self.wealth_logs_
        before = np.concatenate([self.wealth_logs_[None], logs[:-1]]) * self.power
        raised = np.exp(before - before.max(1, keepdims=True))
        weights: np.ndarray = raised / raised.sum(1, keepdims=True)
        return weights
