"""Confidence and mixture against loops; graphs given and found; rows without labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from mixtura.errors import UserError
from mixtura.methods.estimators._graphs import confidence, nearest, neighbours_mean
from mixtura.methods.estimators.mowst import Mowst

X, Y = load_iris(return_X_y=True)


@pytest.mark.parametrize("kind", ["variance", "entropy"])
def test_confidence_by_loops(kind: str) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, shares in enumerate(logits.softmax(-1).tolist()):
        if kind == "variance":
            most = (1 - 1 / 3) ** 2 + 2 / 9
            expected = sum((p - 1 / 3) ** 2 for p in shares) / most
        else:
            expected = 1 + sum(p * math.log(p) for p in shares) / math.log(3)
        assert float(confidence(logits, kind, 2.0)[row, 0]) == pytest.approx(expected**2)
    ends = torch.tensor([[0.0, 0.0, 0.0], [1000.0, 0.0, 0.0]])
    assert confidence(ends, kind, 1.0)[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_means_over_neighbours_by_loops() -> None:
    x = torch.randn(5, 2, dtype=torch.float64)
    edges = torch.tensor([[0, 1, 2, 2], [3, 3, 3, 4]])
    found = neighbours_mean(x, edges)
    assert torch.allclose(found[3], (x[0] + x[1] + x[2]) / 3)
    assert torch.equal(found[4], x[2])
    assert not found[:3].any()


def test_the_nearest_are_others() -> None:
    rows = np.array([[0.0], [1.0], [3.0]])
    assert nearest(rows, None, 1).tolist() == [[1, 0, 1], [0, 1, 2]]
    assert nearest(rows, np.array([[2.9]]), 2).tolist() == [[2, 1], [0, 0]]


def test_a_prediction_is_the_mixture() -> None:
    model = Mowst(epochs=5, rounds=1).fit(X, Y)
    x, joined, num = model.placed(X, None)
    sure, weak, strong = (part[-num:] for part in model._said(x, joined))
    expected = sure * weak.softmax(-1) + (1 - sure) * strong.softmax(-1)
    assert np.allclose(model.predict_proba(X), expected)
    weights = torch.zeros(150, 2, dtype=torch.float64)
    routing = model.route(X)
    weights[routing.token_ids, routing.expert_ids] = routing.weights
    assert torch.allclose(weights[:, :1], sure)


def test_rows_without_labels_are_not_learned_and_give_their_features() -> None:
    edges = nearest(X, None, 4)
    hidden = Y.copy()
    hidden[::2] = -1
    model = Mowst(epochs=10).fit(X, hidden, edges=edges)
    assert model.classes_.tolist() == [0, 1, 2]
    other = np.where(hidden == -1, -1, Y)
    again = Mowst(epochs=10).fit(X, other, edges=edges)
    assert np.array_equal(model.predict_proba(X, edges), again.predict_proba(X, edges))
    assert (model.predict(X, edges)[::2] == Y[::2]).mean() > 0.85


def test_a_graph_helps_where_a_row_says_little() -> None:
    generator = np.random.default_rng(0)
    y = np.arange(200) % 2
    noisy = y[:, None] * 0.6 + generator.normal(size=(200, 4))
    friends = np.stack([generator.choice(np.flatnonzero(y == label), 6) for label in y])
    edges = np.stack([friends.reshape(-1), np.repeat(np.arange(200), 6)])
    known = np.where(np.arange(200) < 100, y, -1)
    model = Mowst(epochs=15).fit(noisy, known, edges=edges)
    alone = model.module_.weak(torch.from_numpy((noisy - noisy.mean(0)) / noisy.std(0)))
    by_row = (alone.argmax(1).numpy()[100:] == y[100:]).mean()
    assert (model.predict(noisy, edges)[100:] == y[100:]).mean() > by_row + 0.1


@pytest.mark.parametrize(
    ("edges", "why"),
    [
        (np.array([[0], [150]]), "name rows from 0 to 149, got 0 to 150"),
        (np.zeros((3, 2), int), "whole numbers of shape \\[2, m\\]"),
        (np.zeros((2, 2)), "whole numbers of shape \\[2, m\\], got float64"),
    ],
)
def test_bad_edges_are_refused(edges: np.ndarray, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Mowst(epochs=1).fit(X, Y, edges=edges)
