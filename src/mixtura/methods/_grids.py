"""Experts on a grid: how many rows and columns a number of them makes."""

from __future__ import annotations

from math import isqrt


def grid_of(num_experts: int) -> tuple[int, int]:
    """Rows and columns whose product is the number of experts, as near to each other as can be.

    >>> grid_of(262_144), grid_of(8), grid_of(7)
    ((512, 512), (2, 4), (1, 7))
    """
    rows = next(size for size in range(isqrt(num_experts), 0, -1) if num_experts % size == 0)
    return rows, num_experts // rows
