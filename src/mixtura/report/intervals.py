"""How sure a mean of a few seeds is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mixtura.errors import UserError


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t; None with one value.

    Raises:
        UserError: scipy is not installed.

    >>> half_width([1.0]), round(half_width([1.0, 2.0, 4.0]), 4)
    (None, 3.7946)
    """
    if len(values) < 2:
        return None
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise UserError("arenas need scipy; install mixtura[train] or mixtura[estimators]") from None
    widest = float(stats.t.ppf(0.975, len(values) - 1))
    half: float = widest * statistics.stdev(values) / len(values) ** 0.5
    return half
