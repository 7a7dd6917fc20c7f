"""What the model router knn promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
import pytest
from model_lessons import NAN, lessons

from mixtura.errors import SettingError
from mixtura.methods.model_routers.knn import Knn


def test_as_many_neighbours_as_prompts_give_the_means() -> None:
    given = lessons(np.eye(5).tolist(), [[1, 0], [1, 0], [0, 1], [0, 0], [NAN, 1]])
    router = Knn(num_neighbours=5, prior=0.0)
    router.fit(given)
    assert np.allclose(router.score(given.batch).quality, [[0.5, 0.4]] * 5)


def test_it_equals_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    given = lessons(generator.normal(size=(30, 4)).tolist(), generator.integers(2, size=(30, 3)).tolist())
    router = Knn(num_neighbours=4, prior=1.0)
    router.fit(given)
    found = router.score(given.batch).quality
    for row, point in enumerate(given.batch.embeddings):
        near = sorted(range(30), key=lambda n: -float(point @ given.batch.embeddings[n]))[:4]
        expected = (given.scores[near].sum(0) + given.scores.mean(0)) / 5
        assert np.allclose(found[row], expected)


def test_no_neighbours_are_refused() -> None:
    with pytest.raises(SettingError, match="num_neighbours of Knn must be in"):
        Knn(num_neighbours=0)
