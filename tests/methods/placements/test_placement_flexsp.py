"""What the placement flexsp promises beyond its kind's contract: brute force finds nothing better."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import UserError
from mixtura.methods.placements._sequences import even_runs
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


def test_batches_are_cut_by_tokens_and_not_by_sequences() -> None:
    """Two batches are enough: half of all tokens are in four of sixteen sequences."""
    lengths = (100, 100, 100, 100, *(33,) * 12)
    groups = Flexsp(most_tokens=100).plan(of_lengths(*lengths), sample_cluster(2, 2)).groups
    by_batch = {group.micro_batch: 0 for group in groups}
    for group in groups:
        by_batch[group.micro_batch] += sum(lengths[one] for one in group.sequences)
    assert by_batch == {0: 400, 1: 396}


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_run_has_the_fewest_tokens(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted((draw.randint(0, 50) for _ in range(9)), reverse=True)
    for num in range(1, 10):
        runs = even_runs(range(9), lengths, num)
        assert [one for run in runs for one in run] == list(range(9))
        assert len(runs) <= num
        cuts = (c for few in range(num) for c in combinations(range(1, 9), few))
        least = min(max(sum(lengths[a:b]) for a, b in pairwise((0, *cut, 9))) for cut in cuts)
        assert max(sum(lengths[one] for one in run) for run in runs) == least


def test_an_empty_sequence_takes_no_device_that_is_not_there() -> None:
    groups = Flexsp(most_tokens=10).plan(of_lengths(0, 5), sample_cluster(1, 2)).groups
    devices = [device for group in groups for device in group.devices]
    assert sorted(set(devices)) == sorted(devices)
    assert max(devices) < 2


def test_a_sequence_that_fits_nowhere_is_refused() -> None:
    # Groups have 1, 2 or 4 devices.
    with pytest.raises(UserError, match="500 tokens does not fit 4 devices with 100 each, the largest group"):
        Flexsp(most_tokens=100).plan(of_lengths(500), sample_cluster(3, 2))
    with pytest.raises(UserError, match="401 tokens does not fit 4 devices with 100 each"):
        Flexsp(most_tokens=100).plan(of_lengths(401, 3), sample_cluster())
    with pytest.raises(UserError, match="does not say how long its sequences are"):
        Flexsp().plan(of_lengths(), sample_cluster())
