"""What the model router logistic promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import NAN, lessons

from mixtura.methods.model_routers._heads import fit_heads
from mixtura.methods.model_routers._shared import sigmoid, with_ones
from mixtura.methods.model_routers.logistic import Logistic


def test_the_gradient_vanishes_where_it_stops() -> None:
    generator = np.random.default_rng(0)
    points = with_ones(generator.normal(size=(60, 3)) / 3)
    targets = (generator.random((60, 2)) < sigmoid(points[:, :2] * 4)).astype(float)
    targets[:10, 1] = NAN
    weights, _ = fit_heads(points, targets, decay=0.05)
    for column in range(2):
        kept = ~np.isnan(targets[:, column])
        wrong = sigmoid(points[kept] @ weights[:, column]) - targets[kept, column]
        slope = points[kept].T @ wrong / kept.sum() + np.array([0.05, 0.05, 0.05, 1e-6]) * weights[:, column]
        assert np.abs(slope).max() < 1e-4


def test_far_from_what_was_learned_it_is_less_sure() -> None:
    given = lessons(np.eye(3)[[0] * 20 + [1] * 20].tolist(), [[1.0]] * 10 + [[0.0]] * 10 + [[1.0]] * 20)
    router = Logistic()
    router.fit(given)
    seen, strange = lessons(np.eye(3)[[0, 2]].tolist(), [[0], [0]]).batch, 1
    assert router.score(seen).error[strange, 0] > router.score(seen).error[0, 0]
