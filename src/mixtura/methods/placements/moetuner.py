"""Balanced experts, and few tokens that change device from layer to layer, by integer programming."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import SettingError, check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._programs import clusters, seats
from mixtura.methods.placements._shared import alone, heaviest_first, placed, places, scipy_optimize, swapped
from mixtura.methods.placements._travel import flow_of, seconds_of_pairs, swept, whole
from mixtura.types.placement import Cluster, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 126,
    "title": "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token Routing",
    "tags": ["equal_counts", "balances", "needs:scipy"],
}
# Up to these many variables a program is solved as it is, or relaxed.
_MOST_EXACT = 2_000
_MOST_RELAXED = 5_000


@final
class Moetuner(Placer):
    """Find balanced groups of experts, then the devices between which fewest tokens travel, by programs.

    Two integer linear programs. The first groups each layer's experts so that the groups' loads differ least
    from the mean. The second lays groups on devices, one each, so that tokens that go on from an expert to
    one of the next layer (transitions in the trace) take least time, where each two layers take as long as
    their slowest pair of devices. Both are solved exactly where they are small (``exact``); else the second
    is relaxed, its result rounded to whole groups and bettered layer by layer (``relaxed``), or only bettered
    (``sweeps``); ``auto`` chooses by size.

    Shapes:
        Any number of experts and devices.

    Raises:
        SettingError: ``solve`` is unknown, or ``seconds`` or ``gap`` is out of range.
        UserError: scipy is not installed.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> trace = sample_trace()
        >>> held = Moetuner().plan(trace, sample_cluster(1, 2)).layers[0].held(2)
        >>> trace.layers[0].load.tolist(), [int(trace.layers[0].load[list(one)].sum()) for one in held]
        ([22, 6, 50, 50, 107, 140, 98, 7], [234, 246])

    Differences from the paper:
        Read in its abstract and in descriptions by others. Solved by HiGHS instead of Gurobi, with the same
        gap of 2.5 %. Devices get as many experts in each layer (``equal_counts``; the authors' condition
        holds over the whole model), so that any engine can run the plan. The time that is made least is the
        sum over layers of the slowest pair's; transitions count all of a token's experts with all of the next
        layer's. The relaxed first program says nothing, because any even split is its optimum: large layers
        are grouped the heaviest first and bettered by exchanges.

    Reference:
        MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token Routing
        (paper 126).
    """

    def __init__(
        self, *, solve: str = "auto", equal_counts: bool = True, seconds: float = 20.0, gap: float = 0.025
    ) -> None:
        if solve not in ("auto", "exact", "relaxed", "sweeps"):
            raise SettingError(f"solve of Moetuner must be auto, exact, relaxed or sweeps, got {solve!r}")
        check_range("Moetuner", "seconds", seconds, 0.1, 1e6)
        check_range("Moetuner", "gap", gap, 0.0, 1.0)
        self.solve = solve
        self.equal_counts = equal_counts
        self.seconds = seconds
        self.gap = gap

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        scipy_optimize("the placement moetuner")
        grouped = [self._grouped(layer, cluster.num_devices) for layer in trace.layers]
        seated = self._seated(trace, grouped, cluster)
        made = {
            layer.index: alone(layer.index, [at[group] for group in groups])
            for layer, groups, at in zip(trace.layers, grouped, seated, strict=True)
        }
        return placed(trace, cluster, lambda layer: made[layer.index])

    def _grouped(self, layer: LayerTrace, num_devices: int) -> list[int]:
        """By expert, its group."""
        loads = layer.load.tolist()
        room = places(len(loads), num_devices)
        if self.solve == "exact" or (self.solve == "auto" and len(loads) * num_devices <= _MOST_EXACT // 20):
            found = clusters(loads, room, equal=self.equal_counts, seconds=self.seconds, gap=self.gap)
            if found is not None:
                return found
        mean = sum(loads) / num_devices

        def uneven(at: list[int]) -> float:
            return float(np.abs(np.bincount(at, loads, num_devices) - mean).sum())

        free = room if self.equal_counts else [len(loads)] * num_devices
        return swapped(heaviest_first(loads, free), uneven)

    def _seated(self, trace: Trace, grouped: list[list[int]], cluster: Cluster) -> list[list[int]]:
        """By layer, the device of each group."""
        num_devices = cluster.num_devices
        flows = [
            flow_of(layer, here, there, num_devices)
            for layer, here, there in zip(trace.layers, grouped, grouped[1:], strict=False)
        ]
        costs = seconds_of_pairs(cluster)
        start = [list(range(num_devices)) for _ in grouped]
        size = len(flows) * num_devices**4
        exact = self.solve == "exact" or (self.solve == "auto" and size <= _MOST_EXACT)
        relaxed = self.solve == "relaxed" or (self.solve == "auto" and size <= _MOST_RELAXED)
        if flows and num_devices > 1 and (exact or relaxed):
            scale = max(float(costs.max()) * max(float(one.max()) for one in flows), 1e-300)
            found = seats(
                flows,
                costs / scale,
                one_node=cluster.num_nodes == 1,
                relaxed=not exact,
                seconds=self.seconds,
                gap=self.gap,
            )
            if found is not None:
                start = [whole(one) for one in found]
        return start if exact else swept(start, flows, costs)
