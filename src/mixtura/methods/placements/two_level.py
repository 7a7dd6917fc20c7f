"""Experts that are chosen together on one node, and balanced inside it."""

from __future__ import annotations

from typing import final

import torch

from mixtura.errors import UserError, check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import alone, heaviest_first, in_order, placed, places, swapped
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 108,
    "title": "SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing",
    "tags": ["equal_counts"],
}


@final
class TwoLevel(Placer):
    """Choose the node of an expert first and its device next, as bi-level routing chooses.

    Where the model's routers choose by group, whole groups lie on a node, so that a token that is limited to
    few groups goes to few nodes. Else experts that are often chosen for the same token (co-activation in the
    trace) are brought together by exchanging pairs, while no node has more than ``slack`` times its even
    share to do. Inside a node the heaviest expert goes first, each to the least busy device.

    Shapes:
        Any number of experts and devices.

    Raises:
        SettingError: ``slack`` is out of range.
        UserError: groups of experts cannot be dealt evenly to the nodes.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> [len(held) for held in TwoLevel().plan(sample_trace(), sample_cluster()).layers[0].held(4)]
        [2, 2, 2, 2]

    Differences from the paper:
        The authors train a router of two levels for one expert a token (the router ``smile``), with a loss of
        balance at each level; experts lie where they are numbered. Bringing together experts of ordinary
        routers by co-activation, and the limit on a node's load, are ours. The exchange in two steps is the
        method ``hierarchical`` of the kind exchanges.

    Reference:
        SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing (paper 108).
    """

    def __init__(self, *, slack: float = 1.1) -> None:
        check_range("TwoLevel", "slack", slack, 1.0, 1e3)
        self.slack = slack

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        return placed(trace, cluster, lambda layer: self._place(layer, cluster))

    def _place(self, layer: LayerTrace, cluster: Cluster) -> LayerPlacement:
        nodes = self._nodes(layer, cluster)
        room = places(layer.shape.num_experts, cluster.num_devices)
        loads, per_node = layer.load.tolist(), cluster.devices_per_node
        devices = [0] * len(nodes)
        for node in range(cluster.num_nodes):
            experts = [expert for expert, at in enumerate(nodes) if at == node]
            inside = room[node * per_node : (node + 1) * per_node]
            if sum(inside) != len(experts):
                inside = places(len(experts), per_node)
            for expert, at in zip(experts, heaviest_first([loads[e] for e in experts], inside), strict=True):
                devices[expert] = node * per_node + at
        return alone(layer.index, devices)

    def _nodes(self, layer: LayerTrace, cluster: Cluster) -> list[int]:
        """By expert, its node."""
        num_experts, num_nodes = layer.shape.num_experts, cluster.num_nodes
        if layer.num_groups > 1:
            if layer.num_groups % num_nodes:
                raise UserError(
                    f"layer {layer.index} chooses by {layer.num_groups} groups of experts, which {num_nodes} "
                    "nodes cannot hold evenly; choose as many nodes as divide them, or another placement"
                )
            dealt = in_order(layer.num_groups, num_nodes)
            return [dealt[e * layer.num_groups // num_experts] for e in range(num_experts)]
        room = places(num_experts, cluster.num_devices)
        per_node = cluster.devices_per_node
        of_node = [sum(room[n * per_node : (n + 1) * per_node]) for n in range(num_nodes)]
        start = heaviest_first(layer.load.tolist(), of_node)
        if layer.coactivation is None or num_nodes == 1:
            return start
        together, load = layer.coactivation.double(), layer.load.double()
        most = max(self.slack * float(load.sum()) / num_nodes, _busiest(start, load, num_nodes))

        def apart(nodes: list[int]) -> float:
            at = torch.tensor(nodes)
            over = _busiest(nodes, load, num_nodes) > most
            return float("inf") if over else float(together[at[:, None] != at].sum())

        return min((swapped(one, apart) for one in (start, _grown(together, of_node))), key=apart)


def _grown(together: torch.Tensor, room: list[int]) -> list[int]:
    """By expert, its node: each node takes again and again whom those on it were chosen with most."""
    nodes = [-1] * len(together)
    for node, count in enumerate(room):
        tied = torch.zeros(len(together), dtype=together.dtype)
        for _ in range(count):
            best = max((e for e, at in enumerate(nodes) if at < 0), key=lambda e: (float(tied[e]), -e))
            nodes[best] = node
            tied += together[best]
    return nodes


def _busiest(nodes: list[int], load: torch.Tensor, num_nodes: int) -> float:
    return float(torch.zeros(num_nodes, dtype=load.dtype).index_add(0, torch.tensor(nodes), load).max())
