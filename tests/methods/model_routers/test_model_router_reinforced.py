"""What the model router reinforced promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import NAN, lessons

from mixtura.methods.model_routers.reinforced import Reinforced


def test_the_reward_is_success_less_a_limited_penalty() -> None:
    given = lessons([[1.0]] * 2, [[1, 0, 1], [1, NAN, 0.5]], costs=[[1e11, 1e11, 1e12], [0, 1, 2e11]])
    assert np.allclose(Reinforced().rewards(given), [[0.7, 0.0, 0.2], [1.0, 0.0, 0.2]])


def test_the_policy_reaches_the_best_that_can_be_counted_out() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.integers(3, size=60)
    chance = np.array([[0.9, 0.3, 0.4], [0.2, 0.8, 0.4], [0.5, 0.5, 0.9]])[kinds]
    given = lessons(np.eye(3)[kinds].tolist(), chance.tolist(), costs=[[1e10, 5e10, 2e11]] * 60)
    router = Reinforced()
    router.fit(given)
    best = router.rewards(given).argmax(1)
    assert (router.score(given.batch).quality.argmax(1) == best).all()
