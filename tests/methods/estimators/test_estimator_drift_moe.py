"""Who is right, who learns, and what naive Bayes counts, against loops; classes that were not named."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from mixtura.errors import UserError
from mixtura.methods.estimators._streams import Moments, NaiveBayes, wanted_experts
from mixtura.methods.estimators.drift_moe import DriftMoe


def stream(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(seed).normal(size=(num, 3))
    return X, (X[:, 0] + X[:, 1] > 0).astype(int)


def test_wanted_are_those_who_are_right_or_nearest_to_it() -> None:
    said = np.array(
        [[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.7, 0.3]], [[0.6, 0.4], [0.9, 0.1]]]
    )  # three experts, two rows
    assert wanted_experts(said, np.array([0, 1])).tolist() == [[1, 0, 1], [1, 0, 0]]


def test_naive_bayes_by_loops() -> None:
    X, y = stream(60, 0)
    moments = Moments(np.zeros((3, 3)))
    moments.add(X)
    experts = NaiveBayes(np.zeros((1, 2)), np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), moments)
    experts.add(X, y, np.zeros((60, 1), int), forget=1.0)
    row, logs = X[5], []
    for label in (0, 1):
        mine = X[y == label]
        total = math.log((len(mine) + 1) / 62)
        for column in range(3):
            # One row of the common moments beside those of the class.
            first = np.append(mine[:, column], X[:, column].mean()).mean()
            power = (np.square(mine[:, column]).sum() + np.square(X[:, column]).mean()) / (len(mine) + 1)
            total -= 0.5 * ((row[column] - first) ** 2 / (power - first**2) + math.log(power - first**2))
        logs.append(total)
    expected = np.exp(logs) / np.exp(logs).sum()
    assert np.allclose(experts.probabilities(X)[0, 5], expected)


def test_forgetting_weighs_rows_by_their_age() -> None:
    X, y = stream(20, 1)
    experts = NaiveBayes(
        np.zeros((1, 2)), np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), Moments(np.zeros((3, 3)))
    )
    experts.add(X, y, np.zeros((20, 1), int), forget=0.9)
    ages = 0.9 ** np.arange(19, -1, -1)
    weights = (ages * (y == 1))[:, None]
    mean = (weights * X).sum(0) / weights.sum()
    assert np.allclose(experts.counts[0, 1], weights.sum())
    assert np.allclose(experts.means[0, 1], mean)
    assert np.allclose(experts.spreads[0, 1], (weights * (X - mean) ** 2).sum(0))


def exact(X: np.ndarray, y: np.ndarray, ages: list[Fraction], row: np.ndarray) -> float:
    """The log odds of class 1 of one column by naive Bayes, in fractions until the logarithms."""
    rows = [Fraction(float(one)) for one in X[:, 0]]
    middle = sum(rows) / len(rows)
    spread, logs = sum((one - middle) ** 2 for one in rows) / len(rows), []
    for label in (0, 1):
        mine = [(age, one) for age, one, kind in zip(ages, rows, y, strict=True) if kind == label]
        number = sum(age for age, _ in mine) + 1
        mean = (sum(age * one for age, one in mine) + middle) / number
        power = (sum(age * one**2 for age, one in mine) + spread + middle**2) / number - mean**2
        apart = (Fraction(float(row[0])) - mean) ** 2 / power
        logs.append(math.log(number) - 0.5 * (float(apart) + math.log(power)))
    return logs[1] - logs[0]


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8, -3e9])
def test_far_from_zero_variances_are_what_they_are(offset: float) -> None:
    X, y = stream(40, 8)
    X = np.round(X[:, :1] * 64) / 64 + offset
    moments = Moments(np.zeros((3, 1)))
    for start in range(0, 40, 8):
        moments.add(X[start : start + 8])
    experts = NaiveBayes(np.zeros((1, 2)), np.zeros((1, 2, 1)), np.zeros((1, 2, 1)), moments)
    experts.add(X, y, np.zeros((40, 1), int), forget=0.9375)
    said = experts.probabilities(X)[0]
    ages = [Fraction(15, 16) ** (39 - place) for place in range(40)]
    for place in range(0, 40, 7):
        wanted = exact(X, y, ages, X[place])
        assert math.log(said[place, 1] / said[place, 0]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    rows = [Fraction(float(one)) for one in X[:, 0]]
    mean = sum(rows) / 40
    wanted = sum((one - mean) ** 2 for one in rows) / 40
    assert float(moments.variance[0]) == pytest.approx(float(wanted), rel=1e-6)


def test_a_column_that_does_not_vary_has_variance_one_wherever_it_lies() -> None:
    for value in (0.0, 0.1, 1e9 + 0.1):
        moments = Moments(np.zeros((3, 1)))
        for _ in range(5):
            moments.add(np.full((7, 1), value))
        assert moments.variance.tolist() == [1.0]
    moments = Moments(np.zeros((3, 1)))
    moments.add(np.array([[1e-9], [3e-9]]))
    assert moments.variance[0] == pytest.approx(1e-18)


def test_only_the_routers_best_learn_a_row() -> None:
    X, y = stream(8, 2)
    model = DriftMoe(num_experts=5, top_k=2, forget=1.0, batch_size=8).partial_fit(X, y)
    assert model.counts_.sum() == 16
    assert (model.counts_.sum(1) <= 8).all()


def test_a_stream_in_parts_is_the_stream() -> None:
    X, y = stream(64, 3)
    whole = DriftMoe().fit(X, y)
    parts = DriftMoe().partial_fit(X[:32], y[:32], classes=[0, 1])
    parts.partial_fit(X[32:], y[32:])
    assert np.array_equal(whole.predict_proba(X), parts.predict_proba(X))


def test_a_saved_stream_goes_on_to_the_same_bytes(tmp_path) -> None:
    X, y = stream(64, 4)
    model = DriftMoe().partial_fit(X[:32], y[:32])
    model.save(tmp_path / "kept.safetensors")
    again = DriftMoe.load(tmp_path / "kept.safetensors")
    for one in (model, again):
        one.partial_fit(X[32:], y[32:])
    assert np.array_equal(model.predict_proba(X), again.predict_proba(X))


def test_a_class_that_was_not_named_is_refused() -> None:
    X, y = stream(32, 5)
    model = DriftMoe().partial_fit(X, y)
    with pytest.raises(UserError, match="class 7 was not among the classes"):
        model.partial_fit(X, np.full(32, 7))
    named = DriftMoe().partial_fit(X, y, classes=[0, 1, 7])
    assert named.partial_fit(X, np.full(32, 7)).predict_proba(X).shape == (32, 3)


def test_a_change_of_concept_is_followed() -> None:
    X, y = stream(600, 6)
    model = DriftMoe(forget=0.98).partial_fit(X[:300], y[:300])
    model.partial_fit(X[300:], 1 - y[300:])
    assert model.score(X[:100], 1 - y[:100]) > 0.8
