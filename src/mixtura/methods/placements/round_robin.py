"""Experts dealt to devices by their number."""

from __future__ import annotations

from typing import final

from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import alone, placed
from mixtura.types.placement import Cluster, Placement
from mixtura.types.trace import Trace

METHOD = {"paper": None, "title": "Experts dealt one by one", "tags": ["equal_counts"]}


@final
class RoundRobin(Placer):
    """Deal experts to devices one by one: expert e lies on device e modulo P. A baseline.

    Shapes:
        Any number of experts and devices; where there are more devices, the last ones own nothing.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> RoundRobin().plan(sample_trace(), sample_cluster()).layers[0].held(4)
        ((0, 4), (1, 5), (2, 6), (3, 7))
    """

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        num_devices = cluster.num_devices
        return placed(
            trace,
            cluster,
            lambda layer: alone(layer.index, [e % num_devices for e in range(layer.shape.num_experts)]),
        )
