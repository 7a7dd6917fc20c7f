"""What the model router category_map promises beyond its kind's contract."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from model_lessons import lessons

from mixtura.errors import UserError
from mixtura.methods.model_routers._shared import greedy_set
from mixtura.methods.model_routers.category_map import CategoryMap


def test_the_set_is_that_of_trying_all() -> None:
    generator = np.random.default_rng(3)
    for _ in range(10):
        gain, sizes = generator.random((4, 6)), generator.integers(1, 9, size=6).tolist()
        budget = 12
        router = CategoryMap(num_bytes=budget)
        chosen = router._chosen(gain, sizes)
        every = [
            [n for n in range(6) if bits[n]]
            for bits in product([0, 1], repeat=6)
            if any(bits) and np.dot(bits, sizes) <= budget
        ]
        best = max(gain[:, some].max(1).sum() for some in every)
        assert np.isclose(gain[:, list(chosen)].max(1).sum(), best)
        assert sum(sizes[n] for n in chosen) <= budget


def test_the_greedy_set_stays_within_the_budget_and_near_the_best() -> None:
    generator = np.random.default_rng(4)
    gain, sizes = generator.random((5, 8)), generator.integers(1, 9, size=8).tolist()
    fits = [n for n in range(8) if sizes[n] <= 10]
    chosen = greedy_set(gain, sizes, fits, 10)
    exact = CategoryMap(num_bytes=10)._chosen(gain, sizes)
    assert sum(sizes[n] for n in chosen) <= 10
    assert gain[:, list(chosen)].max(1).sum() >= 0.95 * gain[:, list(exact)].max(1).sum()


def test_unsure_neighbours_send_to_the_best_over_all() -> None:
    tasks = [{"task": "x"}, {"task": "x"}, {"task": "y"}, {"task": "y"}, {"task": "y"}]
    given = lessons([[1.0]] * 5, [[1, 0]] * 2 + [[0, 1]] * 3, labels=tasks)
    made = []
    for share in (0.5, 0.9):
        router = CategoryMap(num_neighbours=5, least_share=share)
        router.fit(given)
        made.append(router.score(given.batch).quality[0])
    assert made[0][1] > made[1][1] > 0.5


def test_a_budget_needs_sizes_and_something_that_fits() -> None:
    with pytest.raises(UserError, match="needs num_bytes on the card of every model"):
        CategoryMap(num_bytes=5).fit(lessons([[1.0]], [[1, 0]]))
    with pytest.raises(UserError, match="num_bytes of category_map is 5; the smallest model 7"):
        CategoryMap(num_bytes=5).fit(lessons([[1.0]], [[1, 0]], sizes=[7, 9]))
