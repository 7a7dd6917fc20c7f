"""MM-DREX: rules and regimes by loops, the two phases of learning, and no look ahead."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._markets import RULES, log_wealth, regimes, rule_positions
from mixtura.methods.estimators.mm_drex import MmDrex

GENERATOR = np.random.default_rng(1)
X = GENERATOR.normal(0, 0.01, size=(300, 7))
Y = np.where(X[:, -1] < X.mean(1), 0.01, -0.01) + GENERATOR.normal(0, 0.003, 300)


def by_hand(row: np.ndarray, usual: float) -> tuple[list[float], str]:
    """The rules' positions and the regime, read as a person would."""
    prices = [0.0]
    for change in row:
        prices.append(prices[-1] + change)
    spread = float(np.sqrt(np.mean((row - row.mean()) ** 2)))
    new_high = prices[-1] > max(prices[:-1])
    positions = [
        float(prices[-1] > 0),
        float(row[-1] < row.mean()),
        float(new_high),
        min(1.0, usual / spread),
    ]
    if abs(prices[-1]) <= 0.3 * sum(abs(one) for one in row):
        return positions, "reversal"
    if new_high and row[-1] > 0:
        return positions, "breakout"
    return positions, "trend" if prices[-1] > 0 else "positioning"


def test_rules_and_regimes_by_loops() -> None:
    x = torch.from_numpy(X)
    positions = rule_positions(x, torch.tensor(0.008, dtype=torch.float64))
    named = regimes(x)
    seen = set()
    for row in range(len(X)):
        wanted, regime = by_hand(X[row], 0.008)
        assert positions[row].tolist() == pytest.approx(wanted)
        assert RULES[int(named[row])] == regime
        seen.add(regime)
    assert seen == set(RULES)


def test_what_is_put_in_is_the_weighed_sum() -> None:
    model = MmDrex(epochs=4).fit(X, Y)
    weights = model.route(X).scores.numpy()
    for row in range(len(X)):
        positions, _ = by_hand(X[row], float(np.median(X.std(1))))
        assert model.predict(X)[row] == pytest.approx(float(weights[row] @ positions))
    assert model.score(X, Y) == pytest.approx(log_wealth(model.predict(X), Y, 0.0))


def test_taught_alone_it_names_regimes() -> None:
    model = MmDrex(supervised=1.0, epochs=60, batch_size=32, learning_rate=0.01).fit(X, Y)
    named = regimes(torch.from_numpy(X))
    assert (model.route(X).scores.argmax(1) == named).double().mean() > 0.85


def test_the_sharpe_ratio_finds_the_rule_that_earns() -> None:
    taught = MmDrex(supervised=1.0, epochs=40).fit(X, Y)
    hunted = MmDrex(supervised=0.5, epochs=40).fit(X, Y)
    assert hunted.route(X).scores.mean(0).argmax() == RULES.index("reversal")

    def sharpe(model: MmDrex) -> float:
        earned = model.predict(X) * Y
        return float(earned.mean() / earned.std())

    assert sharpe(hunted) > sharpe(taught) + 0.1


def test_later_rows_change_nothing_that_was_said_before() -> None:
    model = MmDrex(epochs=3).fit(X[:200], Y[:200])
    shifted = np.concatenate([X[200:250], np.roll(X[250:], 1, axis=1)])
    assert np.array_equal(model.predict(shifted)[:50], model.predict(X[200:])[:50])


def test_bad_input_is_refused() -> None:
    with pytest.raises(SettingError, match="supervised of MmDrex"):
        MmDrex(supervised=2.0).fit(X, Y)
    with pytest.raises(UserError):
        MmDrex().fit(X, np.stack([Y, Y], axis=1))
