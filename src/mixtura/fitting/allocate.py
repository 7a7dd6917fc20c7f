"""Choosing one option per expert so that the predicted loss is least within a number of bytes.

A multiple-choice knapsack. Few parts, such as tensors, are large beside the budget, and all sums are tried by
dynamic programming: exactly, or where sizes have no large common divisor, with sizes rounded up to
thousandths of the budget. Many parts, such as experts, are solved on the lower convex hull of each one's
(bytes, loss) points: the cheapest loss per byte saved goes first. What is left over is filled by single
upgrades, so the result wastes less than one part's step.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from mixtura.errors import BudgetError

# Numbers of losses up to which all sums are tried, and different sums at most.
_MOST_EXACT, _MOST_STEPS = 8192, 1 << 14

# Letters here: M experts of all layers together, O options of one expert.


def allocate(
    losses: Float[ndarray, "M O"], num_bytes: Int[ndarray, "M O"], budget_bytes: int
) -> Int[ndarray, " M"]:
    """The option of each part with the least total loss that fits the budget, or nearly so of many parts.

    Args:
        losses: predicted loss of each option; infinity forbids one.
        num_bytes: bytes of each option.
        budget_bytes: what all chosen options may take together.

    Returns:
        The index of the chosen option per expert.

    Raises:
        BudgetError: the smallest options together exceed the budget.

    >>> losses = np.array([[0.0, 1.0, 9.0], [0.0, 4.0, 5.0]])
    >>> num_bytes = np.array([[8, 4, 2], [8, 4, 2]])
    >>> allocate(losses, num_bytes, 12).tolist()
    [1, 0]
    """
    allowed = np.where(np.isfinite(losses), num_bytes, np.iinfo(np.int64).max)
    smallest = int(allowed.min(axis=1).sum())
    if smallest > budget_bytes:
        raise BudgetError(f"the experts take at least {smallest} bytes, the budget leaves {budget_bytes}")
    by_hull = _by_hull(losses, num_bytes, budget_bytes)
    if losses.size > _MOST_EXACT:
        return by_hull
    exact = _exact(losses, num_bytes, budget_bytes)
    rows = np.arange(len(losses))
    return exact if losses[rows, exact].sum() <= losses[rows, by_hull].sum() else by_hull


def _exact(
    losses: Float[ndarray, "M O"], num_bytes: Int[ndarray, "M O"], budget_bytes: int
) -> Int[ndarray, " M"]:
    """All sums of sizes beyond the least, part by part: the least loss for each."""
    usable = np.isfinite(losses)
    least = np.where(usable, num_bytes, np.iinfo(np.int64).max).min(axis=1)
    extra = np.where(usable, num_bytes - least[:, None], 0)
    left = budget_bytes - int(least.sum())
    unit = max(int(np.gcd.reduce(extra, axis=None)), 1)
    # No more of a unit than all largest options take, and no finer than the table can be.
    left = min(left, int(extra.max(axis=1).sum()))
    unit *= -(-left // (unit * _MOST_STEPS)) or 1
    steps = -(-extra // unit)
    room = left // unit + 1
    best, taken = np.zeros(room), np.zeros((len(losses), room), dtype=np.int16)
    for part in range(len(losses)):
        after = np.full(room, np.inf)
        for option in np.flatnonzero(usable[part] & (steps[part] < room)):
            step = int(steps[part, option])
            here = best[: room - step] + losses[part, option]
            is_less = here < after[step:]
            after[step:][is_less] = here[is_less]
            taken[part, step:][is_less] = option
        best = after
    place = int(best.argmin())
    chosen = np.zeros(len(losses), dtype=np.int64)
    for part in reversed(range(len(losses))):
        chosen[part] = taken[part, place]
        place -= int(steps[part, chosen[part]])
    spent = int(num_bytes[np.arange(len(chosen)), chosen].sum())
    return _fill(losses, num_bytes, chosen, budget_bytes - spent)


def _by_hull(
    losses: Float[ndarray, "M O"], num_bytes: Int[ndarray, "M O"], budget_bytes: int
) -> Int[ndarray, " M"]:
    """The cheapest loss per byte saved goes first."""
    chosen, steps = _start_and_steps(losses, num_bytes)
    total = int(num_bytes[np.arange(len(chosen)), chosen].sum())
    heapq.heapify(steps)
    while total > budget_bytes:
        _, expert, _, option = heapq.heappop(steps)
        total += int(num_bytes[expert, option] - num_bytes[expert, chosen[expert]])
        chosen[expert] = option
    return _fill(losses, num_bytes, chosen, budget_bytes - total)


def _start_and_steps(
    losses: Float[ndarray, "M O"], num_bytes: Int[ndarray, "M O"]
) -> tuple[Int[ndarray, " M"], list[tuple[float, int, int, int]]]:
    """Each expert's least loss, and its downward steps as (price, expert, place in its row, option)."""
    chosen = np.zeros(len(losses), dtype=np.int64)
    steps: list[tuple[float, int, int, int]] = []
    for expert in range(len(losses)):
        hull = _lower_hull(losses[expert], num_bytes[expert])
        chosen[expert] = hull[0]
        for place, (here, there) in enumerate(pairwise(hull)):
            saved = num_bytes[expert, here] - num_bytes[expert, there]
            price = float((losses[expert, there] - losses[expert, here]) / saved)
            steps.append((price, expert, place, there))
    return chosen, steps


def _lower_hull(losses: Float[ndarray, " O"], num_bytes: Int[ndarray, " O"]) -> list[int]:
    """Options from least loss to fewest bytes, along which each byte saved costs more and more."""
    options = [int(o) for o in np.lexsort((num_bytes, losses)) if np.isfinite(losses[o])]
    hull: list[int] = []
    for option in options:
        if hull and num_bytes[option] >= num_bytes[hull[-1]]:
            continue
        while len(hull) >= 2 and _price(losses, num_bytes, hull[-2], hull[-1]) >= _price(
            losses, num_bytes, hull[-2], option
        ):
            hull.pop()
        hull.append(option)
    return hull


def _price(losses: Float[ndarray, " O"], num_bytes: Int[ndarray, " O"], here: int, there: int) -> float:
    return float((losses[there] - losses[here]) / (num_bytes[here] - num_bytes[there]))


def _fill(
    losses: Float[ndarray, "M O"],
    num_bytes: Int[ndarray, "M O"],
    chosen: Int[ndarray, " M"],
    left_bytes: int,
) -> Int[ndarray, " M"]:
    """Spend what is left on the upgrades that take away the most loss."""
    rows = np.arange(len(chosen))
    while True:
        gain = losses[rows, chosen][:, None] - losses
        cost = num_bytes - num_bytes[rows, chosen][:, None]
        usable = (gain > 0) & (cost <= left_bytes)
        if not usable.any():
            return chosen
        value = np.where(usable, gain / np.maximum(cost, 1), -np.inf)
        expert, option = cast(tuple[int, int], np.unravel_index(int(value.argmax()), value.shape))
        left_bytes -= int(cost[expert, option])
        chosen[expert] = option
