"""What the model router matrix_factorization promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import NAN, lessons

from mixtura.methods.model_routers.matrix_factorization import MatrixFactorization


def test_holes_are_filled_by_what_like_models_did() -> None:
    generator = np.random.default_rng(1)
    kinds = generator.integers(2, size=80)
    points = np.eye(6)[kinds] + 0.1 * generator.normal(size=(80, 6))
    one = (kinds == 0).astype(float)
    scores = np.stack([one, one, 1 - one], axis=1)
    # The second model was never asked prompts of the second kind but twice.
    scores[(kinds == 1) & (np.arange(80) > np.flatnonzero(kinds == 1)[1]), 1] = NAN
    given = lessons(points.tolist(), scores.tolist())
    router = MatrixFactorization(rank=1)
    router.fit(given)
    quality = router.score(given.batch).quality
    assert quality[kinds == 1, 1].max() < 0.5 < quality[kinds == 0, 1].min()


def test_a_seed_settles_it() -> None:
    given = lessons(np.eye(4).tolist(), [[1, 0], [1, 0], [0, 1], [1, 0]])
    made = []
    for seed in (0, 0, 1):
        router = MatrixFactorization(rank=2, num_steps=20, seed=seed)
        router.fit(given)
        made.append(router.score(given.batch).quality)
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
