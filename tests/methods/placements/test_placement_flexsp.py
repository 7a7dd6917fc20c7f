"""What the placement flexsp promises beyond its kind's contract: brute force finds nothing better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import UserError
from mixtura.methods.placements.flexsp import Flexsp
from mixtura.types.trace import Trace


def of_lengths(*lengths: int) -> Trace:
    return replace(sample_trace(), sequence_lengths=lengths, sequence_domains=(0,) * len(lengths))


def sizes(left: int, most: int) -> Iterator[list[int]]:
    """Every way to take groups of 1, 2 or 4 devices, the largest first."""
    yield []
    for size in (4, 2, 1):
        if size <= min(left, most):
            for rest in sizes(left - size, size):
                yield [size, *rest]


def assigned(num: int, groups: int) -> Iterator[list[int]]:
    if num == 0:
        yield []
        return
    for rest in assigned(num - 1, groups):
        for group in range(groups):
            yield [group, *rest]


def test_the_last_group_is_ready_as_soon_as_any_can_be() -> None:
    cluster = sample_cluster(2, 2)
    method = Flexsp(most_tokens=1000, row_num_bytes=20_000, square_s=1e-8, linear_s=1e-5)
    for lengths in ((1900, 700, 300, 200), (3000, 90, 80), (500, 400, 300, 200), (2500,)):
        groups = method.plan(of_lengths(*lengths), cluster).groups
        assert sorted(one for group in groups for one in group.sequences) == list(range(len(lengths)))
        assert len({d for group in groups for d in group.devices}) == sum(len(g.devices) for g in groups)
        found = max(
            method.seconds_of([lengths[one] for one in g.sequences], len(g.devices), cluster) for g in groups
        )
        least = float("inf")
        for chosen in sizes(4, 4):
            for at in assigned(len(lengths), len(chosen)) if chosen else ():
                parts = [[x for x, g in zip(lengths, at, strict=True) if g == n] for n in range(len(chosen))]
                if all(sum(part) <= 1000 * size for part, size in zip(parts, chosen, strict=True)):
                    times = [method.seconds_of(p, s, cluster) for p, s in zip(parts, chosen, strict=True)]
                    least = min(least, max(times))
        assert found == pytest.approx(least, rel=1e-4)


def test_what_does_not_fit_at_once_goes_in_as_few_batches_as_possible() -> None:
    groups = Flexsp(most_tokens=100).plan(of_lengths(300, 250, 200, 150), sample_cluster(2, 2)).groups
    for batch in {group.micro_batch for group in groups}:
        inside = [group for group in groups if group.micro_batch == batch]
        assert sum(len(group.devices) for group in inside) <= 4
    for group in groups:
        lengths = [(300, 250, 200, 150)[one] for one in group.sequences]
        assert sum(lengths) <= 100 * len(group.devices)


def test_a_sequence_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="401 tokens does not fit 4 devices with 100 each"):
        Flexsp(most_tokens=100).plan(of_lengths(401, 3), sample_cluster())
    with pytest.raises(UserError, match="does not say how long its sequences are"):
        Flexsp().plan(of_lengths(), sample_cluster())
