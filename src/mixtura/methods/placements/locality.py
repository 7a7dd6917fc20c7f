"""Experts near the devices whose tokens choose them."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods.placements import Placer, loads_of
from mixtura.methods.placements._shared import alone, heaviest_first, placed, places, scipy_optimize
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 99,
    "title": "LocMoE: A Low-overhead MoE for Large Language Model Training",
    "tags": ["equal_counts", "needs:scipy"],
}


@final
class Locality(Placer):
    """Lay experts on the nodes that send them most, so that fewest tokens cross between nodes.

    Locality-aware placement: of all ways to give each node as many experts, this is one in which the most
    assignments are served on the node that they come from, found exactly as a linear assignment. Inside a
    node the heaviest expert goes first, each to the least busy device.

    Shapes:
        Any number of experts and devices.

    Raises:
        UserError: scipy is not installed.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> [len(held) for held in Locality().plan(sample_trace(), sample_cluster()).layers[0].held(4)]
        [2, 2, 2, 2]

    Differences from the paper:
        Only its abstract and descriptions by others were read. There experts lie still and a loss makes the
        router prefer those of the token's own node (the router ``loc_moe``); here routers are left alone and
        experts move to where they are asked for. How much each node asks is what the trace says of the
        sequences that would lie there; a trace without every token's experts has nothing to say of that,
        and the plan is one of balance alone.

    Reference:
        LocMoE: A Low-overhead MoE for Large Language Model Training (paper 99).
    """

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        solvers = scipy_optimize("the placement locality")
        per_node, num_devices = cluster.devices_per_node, cluster.num_devices

        def place(layer: LayerTrace) -> LayerPlacement:
            loads = loads_of(trace, layer, num_devices)
            asked = loads.view(cluster.num_nodes, per_node, -1).sum(1)
            room = places(layer.shape.num_experts, num_devices)
            of_node = [sum(room[n * per_node : (n + 1) * per_node]) for n in range(cluster.num_nodes)]
            seats = torch.arange(cluster.num_nodes).repeat_interleave(torch.tensor(of_node))
            chosen = solvers.linear_sum_assignment(asked[seats].numpy(), maximize=True)[1]
            devices = [0] * layer.shape.num_experts
            for node in range(cluster.num_nodes):
                experts = sorted(int(e) for e in chosen[seats.numpy() == node])
                inside = room[node * per_node : (node + 1) * per_node]
                dealt = heaviest_first([float(loads[:, e].sum()) for e in experts], inside)
                for expert, device in zip(experts, dealt, strict=True):
                    devices[expert] = node * per_node + device
            return alone(layer.index, devices)

        return placed(trace, cluster, place)
