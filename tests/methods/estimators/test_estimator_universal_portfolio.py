"""Wealth of the mixture is the mean of its strategies' wealths, exactly, whatever prices do."""

from __future__ import annotations

import numpy as np
import pytest

from mixtura.errors import UserError
from mixtura.methods.estimators.universal_portfolio import UniversalPortfolio

GROWTH = np.exp(0.1 * np.random.default_rng(0).normal(size=(60, 3)))


def wealths(model: UniversalPortfolio, growth: np.ndarray) -> list[float]:
    """What every strategy makes of one unit, period by period."""
    return [float(np.prod([float(row @ one) for row in growth])) for one in model.strategies_]


def test_wealth_is_the_mean_of_wealths() -> None:
    model = UniversalPortfolio(num_mixed=20).fit(np.ones((1, 3)))
    each = wealths(model, GROWTH)
    assert UniversalPortfolio(num_mixed=20).score(GROWTH) == pytest.approx(np.mean(each), rel=1e-9)
    assert UniversalPortfolio(num_mixed=20).score(GROWTH) >= max(each) / len(each)


def test_weights_are_powers_of_wealth_before_the_period() -> None:
    model = UniversalPortfolio(num_mixed=5, power=2.0).fit(GROWTH[:10])
    routing = model.route(GROWTH[10:14])
    for period in range(4):
        raised = np.array(wealths(model, GROWTH[: 10 + period])) ** 2
        assert np.allclose(routing.scores[period], raised / raised.sum())


def test_later_prices_change_no_earlier_portfolio() -> None:
    model = UniversalPortfolio().fit(GROWTH[:5])
    later = GROWTH.copy()
    later[30:] *= 3
    assert np.array_equal(model.predict(GROWTH)[:31], model.predict(later)[:31])


def test_portfolios_are_shares() -> None:
    shares = UniversalPortfolio().fit(GROWTH).predict(GROWTH)
    assert (shares >= 0).all()
    assert np.allclose(shares.sum(1), 1)


def test_learning_in_parts_is_learning_at_once() -> None:
    parts = UniversalPortfolio().partial_fit(GROWTH[:20]).partial_fit(GROWTH[20:])
    assert np.allclose(parts.predict(GROWTH), UniversalPortfolio().fit(GROWTH).predict(GROWTH))


def test_growths_are_above_zero() -> None:
    with pytest.raises(UserError, match="growths of prices, which are above 0, got -0"):
        UniversalPortfolio().fit(np.array([[1.0, -0.5]]))
