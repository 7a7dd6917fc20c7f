"""The measured frontier: what each size costs, and where quality falls off a cliff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Measured, Quality
from mixtura.report import human_number
from mixtura.report.units import format_bytes

# A bit less of a weight doubles rounding errors, and KL grows as their squares.
USUAL_GROWTH = 4.0
# A cliff is where it grows by the square of that for a bit, and is worth a word at all.
_CLIFF_GROWTH = USUAL_GROWTH**2
_LEAST_KL = 0.01
_BITS = 16


@final
@dataclass(frozen=True, slots=True)
class Step:
    """From a point of the frontier to the next smaller one, over which quality falls off a cliff.

    Attributes:
        above: the point before.
        below: the point after.
        growth: how many times as large KL becomes for a sixteenth of the original's weights.
    """

    above: Measured
    below: Measured
    growth: float

    @property
    def told(self) -> str:
        """A sentence for people."""
        above, below = self.above, self.below
        return (
            f"quality falls off a cliff below {format_bytes(above.account_bytes)}: at "
            f"{format_bytes(below.account_bytes)} KL is {human_number(below.quality.kl)} instead of "
            f"{human_number(above.quality.kl)}, {human_number(self.growth)} times as much for a sixteenth of "
            f"the original's weights, where rounding usually costs {USUAL_GROWTH:g} times"
        )


def frontier(tried: Iterable[Measured]) -> tuple[Measured, ...]:
    """What nothing else that was measured is both smaller and better than, the largest first."""
    found: list[Measured] = []
    for measured in sorted(tried, key=lambda m: (m.account_bytes, m.quality.kl)):
        if not found or measured.quality.kl < found[-1].quality.kl:
            found.append(measured)
    return tuple(reversed(found))


def cliff(points: Sequence[Measured], original_bytes: int) -> Step | None:
    """The largest size below which quality falls off a cliff; None where it does not.

    That is where KL grows more than 16-fold for a sixteenth of the original's weights, a bit of 16, and is
    at least 0.01 nats a token then. Rounding makes it grow 4-fold.

    Args:
        points: a frontier, from the largest to the smallest.
        original_bytes: of the original's weights.
    """
    for above, below in pairwise(points):
        bits = _BITS * (above.account_bytes - below.account_bytes) / original_bytes
        before, after = above.quality.kl, below.quality.kl
        if after < _LEAST_KL or before <= 0:
            continue
        # A small step is not made to speak for a large one.
        growth = (after / before) ** (1 / max(bits, 1 / 4))
        if growth > _CLIFF_GROWTH:
            return Step(above, below, growth)
    return None


def frontier_rows(points: Iterable[Measured], chosen: Quality) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table of a frontier, as the terminal and the page show it.

    ``chosen`` is what was measured of the plan that was chosen.
    """
    headers = ["accounted", "KL, nats", "perplexity", "same top token", "plan"]
    cells = []
    for point in points:
        mark = " (chosen)" if point.quality == chosen else ""
        cells.append(
            [
                format_bytes(point.account_bytes),
                human_number(point.quality.kl),
                human_number(point.quality.perplexity[ALL]),
                f"{point.quality.equal_top:.1%}",
                f"{point.candidate.label}{mark}",
            ]
        )
    return headers, cells
