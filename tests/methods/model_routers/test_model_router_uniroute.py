"""What the model router uniroute promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import lessons

from mixtura.methods.model_routers.uniroute import Uniroute


def test_one_cluster_is_the_best_single_model() -> None:
    given = lessons(np.eye(4).tolist(), [[1, 0], [1, 0], [0, 1], [1, 0]])
    router = Uniroute(num_clusters=1)
    router.fit(given)
    assert np.allclose(router.score(given.batch).quality, [[0.75, 0.25]] * 4)


def test_as_many_clusters_as_prompts_are_the_nearest_neighbour() -> None:
    given = lessons(np.eye(4).tolist(), [[1, 0], [1, 0], [0, 1], [1, 1]])
    router = Uniroute(num_clusters=4, prior=0.0)
    router.fit(given)
    assert np.allclose(router.score(given.batch).quality, given.scores)


def test_a_new_model_needs_few_labels_and_no_clusters_anew() -> None:
    given = lessons(np.eye(3)[[0, 0, 1, 1, 2, 2]].tolist(), [[1], [1], [0], [0], [1], [0]])
    router = Uniroute(num_clusters=3, prior=0.0)
    router.fit(given)
    centres = router.state["centres"]
    few = lessons(np.eye(3)[[1, 2]].tolist(), [[0, 1], [0, 0]])
    from dataclasses import replace

    router.admit(replace(few, cards=few.cards[1:], scores=few.scores[:, 1:], costs=few.costs[:, 1:]))
    assert router.state["centres"] is centres
    found = router.score(given.batch).quality
    # Where it was asked nothing, its mean stands in.
    assert np.allclose(found[[0, 2, 4], 1], [0.5, 1.0, 0.0])
