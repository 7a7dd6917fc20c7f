"""What the model router task_prior promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
import pytest
from model_lessons import NAN, lessons

from mixtura.methods.model_routers.task_prior import TaskPrior


def test_a_task_never_seen_and_a_prompt_without_label_get_the_means_over_all() -> None:
    tasks = [{"task": "x"}, {"task": "x"}, {"task": "y"}, {"task": "y"}]
    given = lessons([[1.0]] * 4, [[1, 0], [1, 0], [0, 1], [0, NAN]], labels=tasks)
    router = TaskPrior()
    router.fit(given)
    other = lessons([[1.0]] * 2, [[0, 0]] * 2, labels=[{"task": "z"}, {}])
    assert np.allclose(router.score(other.batch).quality, [[0.5, 1 / 3]] * 2)


@pytest.mark.parametrize("prior", [0.0, 3.0])
def test_means_are_drawn_to_the_models_own_by_so_many_outcomes(prior: float) -> None:
    tasks = [{"kind": "x"}, {"kind": "x"}, {"kind": "y"}, {"kind": "y"}]
    given = lessons([[1.0]] * 4, [[1, 0], [1, 0], [0, 1], [0, 1]], labels=tasks)
    router = TaskPrior(label="kind", prior=prior)
    router.fit(given)
    assert np.isclose(router.score(given.batch).quality[0, 0], (2 + prior / 2) / (2 + prior))
