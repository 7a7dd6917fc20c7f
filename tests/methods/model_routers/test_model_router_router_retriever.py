"""What the model router router_retriever promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import lessons

from mixtura.methods.model_routers.router_retriever import RouterRetriever

POINTS = np.eye(3)[[0, 0, 1, 1, 2]].tolist()
SCORES = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_an_expert_that_leaves_changes_only_prompts_it_had() -> None:
    given = lessons(POINTS, SCORES)
    router = RouterRetriever()
    router.fit(given)
    whole = [one.model for one in router.decide(given.batch, given.cards, given.costs)]
    left = [one.model for one in router.decide(given.batch, given.cards[:2], given.costs[:, :2])]
    assert whole == ["a", "a", "b", "b", "c"]
    assert left[:4] == whole[:4]


def test_scattered_pilots_hurt_by_the_mean() -> None:
    labels = [{"task": "x"}, {"task": "x"}, {"task": "x"}, {"task": "x"}, {"task": "y"}]
    # The first model is best on two tasks whose prompts point in different directions.
    given = lessons(POINTS, [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]], labels=labels)
    router = RouterRetriever()
    router.fit(given)
    assert np.allclose(router.score(given.batch).quality[0], [0.75, 0.5])
