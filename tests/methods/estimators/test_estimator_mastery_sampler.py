"""Walks, clusters and draws by loops; one cluster where all may be together; a rare kind is drawn evenly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._walks import dp_means, even_draw, refined, vectors, walks
from mixtura.methods.estimators.mastery_sampler import MasterySampler


def students(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mastery of nine skills by groups of 900, 60 and 40, each with a rule for its strategy."""
    generator = np.random.default_rng(seed)
    group = np.repeat([0, 1, 2], [900, 60, 40])
    X = 0.5 * generator.random((1000, 9)) + np.kron(np.eye(3), np.ones(3))[group]
    rule = np.stack([X[:, 0] > 1.25, X[:, 3] < 1.25, X[:, 6] > X[:, 7]])
    return X, rule[group, np.arange(1000)].astype(int), group


def test_walks_go_along_weights() -> None:
    weights = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    found = walks(weights, 6, 4, 1.0, 1.0, np.random.default_rng(0))
    assert len(found) == 12
    assert all(len(walk) == 6 for walk in found)
    assert {column for walk in found for column in walk if walk[0] == 2} == {2}
    assert {column for walk in found for column in walk if walk[0] != 2} == {0, 1}
    # Hardly ever back to where it came from: columns of a row take turns.
    onward = walks(np.ones((30, 2)), 50, 2, 1e6, 1.0, np.random.default_rng(0))
    assert all(a != b for walk in onward for a, b in pairwise(walk))
    stuck = walks(np.ones((30, 2)), 50, 2, 1e-6, 1.0, np.random.default_rng(0))
    assert all(len(set(walk)) == 1 for walk in stuck)


def test_columns_that_walk_together_have_vectors_alike() -> None:
    torch.manual_seed(0)
    found = vectors([[0, 1] * 20, [2, 3] * 20] * 20, 4, 8, reach=2, epochs=10, learning_rate=0.05)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    alike = unit @ unit.T
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[1, 3], alike[0, 3]) + 0.5


def test_clusters_are_as_wide_as_is_said() -> None:
    rows = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]])
    assert dp_means(rows, 1.0).tolist() in ([0, 0, 0, 1, 1, 2], [1, 1, 1, 0, 0, 2], [2, 2, 2, 0, 0, 1])
    assert len(set(dp_means(rows, 1.0).tolist())) == 3
    assert set(dp_means(rows, np.inf).tolist()) == {0}
    for wide in (0.3, 1.0, 3.0):
        label = dp_means(rows, wide)
        for one in set(label.tolist()):
            mine = rows[label == one]
            assert np.abs(mine - mine.mean(0)).max() <= wide


def test_only_clusters_of_several_kinds_are_cut_up() -> None:
    rows = np.array([[0.0], [0.4], [4.0], [4.4]])
    kinds = np.array([0, 1, 1, 1])
    assert len(set(refined(rows, kinds, 1.0, 0.8, 1).tolist())) == 2
    label = refined(rows, kinds, 1.0, 0.8, 4)
    assert label[0] != label[1]
    assert label[2] == label[3]


def test_draws_are_even_until_a_cluster_is_empty() -> None:
    label = np.repeat([0, 1, 2], [20, 5, 2])
    drawn = even_draw(label, 12, np.random.default_rng(0))
    assert np.bincount(label[drawn]).tolist() == [5, 5, 2]
    assert len(set(drawn.tolist())) == 12
    assert even_draw(label, 99, np.random.default_rng(0)).tolist() == list(range(27))


def test_all_together_is_one_cluster(tmp_path: Path) -> None:
    X, y, group = students(0)
    assert set(MasterySampler(wide=1.0, levels=1).fit(X, y).labels_.tolist()) == {0}
    model = MasterySampler().fit(X, y)
    assert np.array_equal(model.fit(X, y).draw(50), MasterySampler().fit(X, y).draw(50))
    purest = [np.bincount(group[model.labels_ == one]).max() for one in range(model.labels_.max() + 1)]
    assert sum(purest) > 0.97 * len(X)
    model.save(tmp_path / "kept")
    assert np.array_equal(MasterySampler.load(tmp_path / "kept").predict(X), model.predict(X))


def test_what_learns_an_even_draw_is_fairer_to_the_worst_group() -> None:
    X, y, _ = students(1)
    new_x, new_y, new_group = students(2)
    worst = {"even": [], "random": []}
    for seed in range(5):
        drawn = {
            "even": MasterySampler(random_state=seed).fit(X, y).draw(50),
            "random": np.random.default_rng(seed).choice(1000, 50, replace=False),
        }
        for name, rows in drawn.items():
            model = LogisticRegression(max_iter=1000, C=10).fit(X[rows], y[rows])
            right = model.predict(new_x) == new_y
            worst[name].append(min(right[new_group == one].mean() for one in range(3)))
    assert np.mean(worst["even"]) > np.mean(worst["random"]) + 0.05


def test_what_cannot_be_is_refused() -> None:
    X, y, _ = students(0)
    with pytest.raises(UserError, match="a label a row, 1000 of them, or None"):
        MasterySampler().fit(X, y[:10])
    with pytest.raises(SettingError, match="levels of MasterySampler must be in"):
        MasterySampler(levels=0).fit(X, y)
    with pytest.raises(SettingError, match="num of draw must be in"):
        MasterySampler(epochs=1).fit(X, y).draw(0)
