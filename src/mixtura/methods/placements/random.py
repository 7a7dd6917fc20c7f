"""Experts dealt in an order drawn by lot."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._drawing import generator_of
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import alone, in_order, placed
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {"paper": None, "title": "Experts dealt by lot", "tags": ["equal_counts"]}


@final
class Random(Placer):
    """Deal as many experts to each device, in an order drawn by lot for each layer. A baseline.

    Shapes:
        Any number of experts and devices.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> [len(held) for held in Random().plan(sample_trace(), sample_cluster()).layers[0].held(4)]
        [2, 2, 2, 2]
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        generator = generator_of(self.seed)

        def place(layer: LayerTrace) -> LayerPlacement:
            num_experts = layer.shape.num_experts
            order = torch.randperm(num_experts, generator=generator).tolist()
            dealt = in_order(num_experts, cluster.num_devices)
            return alone(layer.index, [dealt[place] for place in order])

        return placed(trace, cluster, place)
