"""Who is right, who learns, and what naive Bayes counts, against loops; classes that were not named."""

from __future__ import annotations

import math

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
    assert np.allclose(experts.sums[0, 1], (ages[:, None] * X * (y == 1)[:, None]).sum(0))


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
