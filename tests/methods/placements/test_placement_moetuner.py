"""What the placement moetuner promises beyond its kind's contract: brute force finds nothing better."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import SettingError
from mixtura.methods.placements._programs import clusters, seats
from mixtura.methods.placements._travel import seconds_of_pairs
from mixtura.methods.placements.moetuner import Moetuner
from mixtura.types.placement import Cluster, Placement
from mixtura.types.trace import Trace


def unevenness(loads: list[float], at: tuple[int, ...], num: int) -> float:
    mean = sum(loads) / num
    return sum(abs(sum(x for x, c in zip(loads, at, strict=True) if c == d) - mean) for d in range(num))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("num_clusters", [2, 3])
def test_groups_are_as_even_as_any_can_be(equal: bool, num_clusters: int) -> None:
    for seed in range(3):
        loads = np.random.default_rng(seed).integers(1, 60, 6).astype(float).tolist()
        found = clusters(loads, [6 // num_clusters] * num_clusters, equal=equal, seconds=20, gap=0.0)
        assert found is not None
        ways = [
            at
            for at in product(range(num_clusters), repeat=6)
            if len(set(at)) == num_clusters
            and (not equal or all(at.count(c) == 6 // num_clusters for c in range(num_clusters)))
        ]
        least = min(unevenness(loads, at, num_clusters) for at in ways)
        assert unevenness(loads, tuple(found), num_clusters) == pytest.approx(least)


def slowest(flows: list[NDArray[np.float64]], costs: NDArray[np.float64], at: list[tuple[int, ...]]) -> float:
    """The sum over neighbouring layers of the slowest pair's time, pair by pair."""
    total = 0.0
    for flow, here, there in zip(flows, at, at[1:], strict=False):
        pairs = np.zeros_like(costs)
        for one, device in enumerate(here):
            for other, next_device in enumerate(there):
                pairs[device, next_device] += flow[one, other] * costs[device, next_device]
        total += pairs.max()
    return total


@pytest.mark.parametrize("size", [(1, 3), (3, 1), (2, 2)])
def test_groups_sit_as_well_as_any_can(size: tuple[int, int]) -> None:
    cluster = sample_cluster(*size)
    num = cluster.num_devices
    costs = seconds_of_pairs(cluster) * 1e9
    flows = [np.random.default_rng(seed).integers(0, 30, (num, num)).astype(float) for seed in range(5 - num)]
    found = seats(flows, costs, one_node=size[0] == 1, relaxed=False, seconds=60, gap=0.0)
    assert found is not None
    seated = [tuple(int(one) for one in layer.argmax(1)) for layer in found]
    every = [list(permutations(range(num))) for _ in range(len(flows) + 1)]
    least = min(slowest(flows, costs, list(at)) for at in product(*every))
    assert slowest(flows, costs, seated) == pytest.approx(least)


def travelled(trace: Trace, made: Placement, cluster: Cluster) -> float:
    """Seconds per byte of all that goes from an expert to one of the next layer."""
    total = 0.0
    for place in range(len(trace.layers) - 1):
        moves = trace.layers[place].transitions
        assert moves is not None
        for one in range(moves.shape[0]):
            for other in range(moves.shape[1]):
                link = cluster.link(made.layers[place].owner(one), made.layers[place + 1].owner(other))
                total += float(moves[one, other]) / link.bytes_per_s if link else 0.0
    return total


def test_every_way_to_solve_lets_tokens_travel_less_than_numbers_do() -> None:
    trace, cluster = sample_trace(3, num_layers=3, num_experts=8), sample_cluster(2, 2)
    plain = travelled(trace, Moetuner(solve="sweeps").plan(trace, sample_cluster(1, 1)), cluster)
    assert plain == 0.0
    times = {
        solve: travelled(trace, Moetuner(solve=solve, seconds=5.0).plan(trace, cluster), cluster)
        for solve in ("relaxed", "sweeps")
    }
    from mixtura.methods.placements.contiguous import Contiguous

    by_number = travelled(trace, Contiguous().plan(trace, cluster), cluster)
    assert max(times.values()) < by_number


@pytest.mark.parametrize(("equal", "busiest"), [(True, 1015), (False, 1000)])
def test_many_experts_need_not_be_as_many_on_each_device(equal: bool, busiest: int) -> None:
    trace = sample_trace(num_layers=1, num_experts=64)
    counts = torch.zeros_like(trace.layers[0].counts)
    counts[0], counts[0, 0] = 1, 1000
    layer = replace(trace.layers[0], counts=counts)
    made = Moetuner(equal_counts=equal).plan(replace(trace, layers=(layer,)), sample_cluster(1, 4))
    loads = [sum(int(layer.load[one]) for one in held) for held in made.layers[0].held(4)]
    assert max(loads) == busiest
    assert min(loads) > 0


def test_other_ways_to_solve_are_refused() -> None:
    with pytest.raises(SettingError, match="solve of Moetuner must be auto, exact, relaxed or sweeps"):
        Moetuner(solve="gurobi")
