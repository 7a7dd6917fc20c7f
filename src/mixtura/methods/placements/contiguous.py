"""Consecutive experts on one device, as expert parallelism does where nothing is known."""

from __future__ import annotations

from typing import final

from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import placed_in_order
from mixtura.types.placement import Cluster, Placement
from mixtura.types.trace import Trace

METHOD = {"paper": None, "title": "Consecutive experts together", "tags": ["equal_counts"]}


@final
class Contiguous(Placer):
    """Lay consecutive experts on one device, as many on each: what expert parallelism does by default.

    transformers' own expert parallelism lays them so, without looking at any load.

    Shapes:
        Any number of experts and devices; where they do not divide, the first devices own one more.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> Contiguous().plan(sample_trace(), sample_cluster()).layers[0].held(4)
        ((0, 1), (2, 3), (4, 5), (6, 7))
    """

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        return placed_in_order(trace, cluster)
