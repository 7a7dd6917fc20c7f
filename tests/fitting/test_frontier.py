"""The frontier of what was measured, and the rule for a cliff."""

from __future__ import annotations

import pytest

from mixtura.fitting.frontier import cliff, frontier, frontier_rows
from mixtura.fitting.records import Candidate, Measured, Quality

WEIGHTS = 16_000


def point(num_bytes: int, kl: float) -> Measured:
    quality = Quality(
        kl=kl, kl_low=kl, kl_high=kl, equal_top=0.9, perplexity={"all": 8.0}, kl_by_domain={"all": kl}
    )
    return Measured(
        candidate=Candidate(f"plan of {num_bytes}", (num_bytes % 7,)),
        expert_bytes=num_bytes,
        account_bytes=num_bytes,
        active_bytes=0.0,
        quality=quality,
    )


def test_nothing_on_it_is_both_larger_and_worse() -> None:
    tried = [point(9, 0.1), point(5, 0.4), point(7, 0.5), point(9, 0.2), point(12, 0.1), point(3, 0.9)]
    found = [(m.account_bytes, m.quality.kl) for m in frontier(tried)]
    assert found == [(9, 0.1), (5, 0.4), (3, 0.9)]
    assert frontier([]) == ()


def test_rounding_as_usual_is_no_cliff() -> None:
    points = frontier([point(bits * 1000, 4.0**-bits) for bits in range(2, 9)])
    assert cliff(points, WEIGHTS) is None


def test_the_first_fall_is_told_with_both_sizes() -> None:
    points = frontier([point(4000, 0.001), point(3000, 0.004), point(2000, 0.08), point(1000, 5.0)])
    found = cliff(points, WEIGHTS)
    assert found is not None
    assert (found.above.account_bytes, found.below.account_bytes) == (3000, 2000)
    assert found.growth == pytest.approx(20)
    assert "0.08 instead of 0.004, 20 times as much" in found.told


def test_what_is_small_or_near_is_no_cliff() -> None:
    assert cliff(frontier([point(3000, 1e-5), point(2000, 0.009)]), WEIGHTS) is None
    # A tenth of a bit further and 1.5 times as much: less than the square of usual growth.
    assert cliff(frontier([point(3000, 0.02), point(2900, 0.03)]), WEIGHTS) is None
    assert cliff(frontier([point(3000, 0.0), point(2900, 0.03)]), WEIGHTS) is None


def test_the_table_marks_what_was_chosen() -> None:
    headers, cells = frontier_rows(
        frontier([point(4000, 0.001), point(3000, 0.004)]), point(3000, 0.004).quality
    )
    assert len(headers) == len(cells[0])
    assert [row[-1].endswith("(chosen)") for row in cells] == [False, True]
