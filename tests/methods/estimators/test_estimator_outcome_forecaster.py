"""Confidence that never falls and is honest; what is held out is not learned; reports by loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

from mixtura.errors import SettingError
from mixtura.methods.estimators._confidence import held_out, monotone, reliability, restated
from mixtura.methods.estimators.outcome_forecaster import OutcomeForecaster

X, Y = load_iris(return_X_y=True)


def noisy(seed: int, num: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Whether the sum of two numbers is above zero, with noise that a row says nothing of."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(num, 10))
    return rows, (rows[:, 0] + rows[:, 1] + 1.5 * generator.normal(size=num) > 0).astype(int)


def test_every_class_is_held_out_in_part() -> None:
    numbers = np.repeat([0, 1, 2], [40, 10, 1])
    aside = held_out(numbers, 0.3, 0)
    assert [int(aside[numbers == label].sum()) for label in range(3)] == [12, 3, 0]
    assert not held_out(numbers, 0.0, 0).any()
    assert not np.array_equal(aside, held_out(numbers, 0.3, 1))


def test_the_curve_is_that_of_pooled_neighbours() -> None:
    confidence = np.array([0.5, 0.6, 0.7, 0.8, 0.9])
    right = np.array([False, True, False, True, True])
    curve = monotone(confidence, right)
    # A wrong one beside the first, a right one beside the last; 0.6 and 0.7 are pooled.
    assert np.interp(confidence, *curve) == pytest.approx([0, 0.5, 0.5, 1, 1])
    falling = monotone(confidence, right[::-1])
    assert (np.diff(falling[1]) >= 0).all()
    assert monotone(confidence[:0], right[:0]).shape == (2, 0)


def test_probabilities_are_restated_by_loops() -> None:
    shares = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.4, 0.35, 0.25]])
    curve = np.array([[0.5, 1.0], [0.4, 0.9]])
    found = restated(shares, curve)
    assert found.sum(1) == pytest.approx(1)
    assert found[0] == pytest.approx([0.5, 0.5 * 0.75, 0.5 * 0.25])
    assert found[1] == pytest.approx([0.4 * 2 / 3, 0.6, 0.4 / 3])
    # 0.4 would go to 0.4, which is above what the second then has.
    assert found[2] == pytest.approx([0.4, 0.35, 0.25])
    assert (restated(shares, np.array([[0.0, 1.0], [0.0, 0.0]])).argmax(1) == shares.argmax(1)).all()
    assert restated(shares, np.zeros((2, 0))) is shares


def test_a_report_by_loops() -> None:
    confidence, right = np.array([0.95, 0.9, 0.55, 0.52, 1.0]), np.array([1, 1, 0, 1, 0]).astype(bool)
    found = reliability(confidence, right, 0.9)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["share sure"] == pytest.approx(0.6)
    assert found["accuracy where sure"] == pytest.approx(2 / 3)
    bins = [abs(0.95 + 0.9 + 1.0 - 2), abs(0.55 + 0.52 - 1)]
    assert found["calibration error"] == pytest.approx(sum(bins) / 5)
    assert np.isnan(reliability(confidence, right, 1.1)["accuracy where sure"])


def test_confidence_is_nearer_to_the_truth_than_the_network_s(tmp_path: Path) -> None:
    rows, y = noisy(0)
    new_rows, new_y = noisy(1, 2000)
    errors = {"raw": [], "stated": []}
    for seed in range(3):
        model = OutcomeForecaster(random_state=seed, epochs=60).fit(rows, y)
        raw = model.raw_proba(new_rows)
        right = raw.argmax(1) == new_y
        errors["raw"].append(reliability(raw.max(1), right, 0.8)["calibration error"])
        found = model.report(new_rows, new_y)
        errors["stated"].append(found["calibration error"])
        assert found["accuracy"] == pytest.approx(right.mean(), abs=0.01)
        order = raw.max(1).argsort()
        assert (np.diff(model.predict_proba(new_rows).max(1)[order]) >= -1e-6).all()
    assert np.mean(errors["stated"]) < 0.5 * np.mean(errors["raw"])
    model.save(tmp_path / "kept")
    again = OutcomeForecaster.load(tmp_path / "kept")
    assert np.array_equal(again.predict_proba(new_rows), model.predict_proba(new_rows))


def test_it_abstains_below_what_is_sure() -> None:
    model = OutcomeForecaster(sure=0.9, epochs=20).fit(X, Y)
    assert np.array_equal(model.abstains(X), model.predict_proba(X).max(1) < 0.9)
    assert not model.set_params(sure=0.0).abstains(X).any()


def test_without_rows_held_out_confidence_is_the_network_s() -> None:
    model = OutcomeForecaster(held=0.0, epochs=5).fit(X, Y)
    assert np.array_equal(model.raw_proba(X), model.predict_proba(X))
    with pytest.raises(SettingError, match="held of OutcomeForecaster must be in"):
        OutcomeForecaster(held=0.95).fit(X, Y)
