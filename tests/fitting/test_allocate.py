"""The knapsack against every possible choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.errors import BudgetError
from mixtura.fitting.allocate import allocate


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 40, (5, 4)), axis=1)[:, ::-1].copy()
    losses = np.sort(rng.random((5, 4)), axis=1)
    losses[:, 0] = 0.0
    budget = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
    return losses, sizes, budget


def exhaustive(losses: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    rows = np.arange(len(losses))
    choices = itertools.product(range(losses.shape[1]), repeat=len(losses))
    return min(losses[rows, list(c)].sum() for c in choices if sizes[rows, list(c)].sum() <= budget)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_keeps_the_budget_and_comes_within_one_step_of_the_best(seed: int) -> None:
    losses, sizes, budget = problem(seed)
    chosen = allocate(losses, sizes, budget)
    rows = np.arange(len(chosen))
    assert sizes[rows, chosen].sum() <= budget
    # The hull's optimum is off by less than the largest single step of one expert.
    assert losses[rows, chosen].sum() <= exhaustive(losses, sizes, budget) + losses.max()


def test_average_gap_to_the_best_is_small() -> None:
    gaps = []
    for seed in range(40):
        losses, sizes, budget = problem(seed)
        chosen = allocate(losses, sizes, budget)
        gaps.append(losses[np.arange(len(chosen)), chosen].sum() - exhaustive(losses, sizes, budget))
    assert np.mean(gaps) < 0.06 * losses.max() * len(losses)


def test_a_generous_budget_changes_nothing() -> None:
    losses, sizes, _ = problem(0)
    assert allocate(losses, sizes, int(sizes.sum())).tolist() == [0] * len(losses)


def test_forbidden_options_are_never_taken() -> None:
    losses = np.array([[0.0, np.inf, 5.0], [0.0, 1.0, np.inf]])
    sizes = np.array([[9, 5, 1], [9, 5, 1]])
    assert allocate(losses, sizes, 6).tolist() == [2, 1]


def test_a_budget_below_the_smallest_is_refused_with_the_size() -> None:
    losses, sizes, _ = problem(0)
    with pytest.raises(BudgetError, match=str(int(sizes.min(1).sum()))):
        allocate(losses, sizes, int(sizes.min(1).sum()) - 1)


@pytest.mark.parametrize("seed", range(20))
def test_few_parts_get_the_least_of_all_sums(seed: int) -> None:
    """Beside every combination tried in turn, some options forbidden."""
    rng = np.random.default_rng(seed)
    parts, options = int(rng.integers(2, 6)), int(rng.integers(2, 5))
    losses = rng.uniform(0, 1, (parts, options))
    losses[1:][rng.random((parts - 1, options)) < 0.2] = np.inf
    losses[:, 0] = rng.uniform(0, 1, parts)
    num_bytes = rng.integers(1, 60, (parts, options)) * 96
    rows = np.arange(parts)
    least = int(np.where(np.isfinite(losses), num_bytes, 10**9).min(1).sum())
    budget = least + int(rng.integers(0, 6000))
    chosen = allocate(losses, num_bytes, budget)
    assert num_bytes[rows, chosen].sum() <= budget
    best = min(
        losses[rows, list(every)].sum()
        for every in itertools.product(range(options), repeat=parts)
        if num_bytes[rows, list(every)].sum() <= budget
    )
    assert losses[rows, chosen].sum() == pytest.approx(best, abs=1e-12)
