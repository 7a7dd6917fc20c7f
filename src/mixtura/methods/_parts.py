"""How many of a number a share of them is, where products of floats are a hair off."""

from __future__ import annotations

import math

# More than the relative rounding of a product, and less than one in any number of parts.
_HAIR = 1e-9


def part_of(share: float, number: int) -> int:
    """How many whole ones a share of so many is.

    >>> int(0.29 * 100), part_of(0.29, 100), part_of(0.295, 100)
    (28, 29, 29)
    """
    return math.floor(share * number + _HAIR)


def part_above(share: float, number: int) -> int:
    """The least number that is a share of so many at least.

    >>> math.ceil(0.07 * 100), part_above(0.07, 100), part_above(0.071, 100)
    (8, 7, 8)
    """
    return math.ceil(share * number - _HAIR)
