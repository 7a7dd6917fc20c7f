"""What the placement two_level promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import UserError
from mixtura.methods.placements.two_level import TwoLevel


def test_experts_chosen_together_lie_on_one_node() -> None:
    trace = sample_trace(num_experts=8)
    together = torch.zeros(8, 8, dtype=torch.int64)
    for one, other in ((0, 5), (1, 4), (2, 7), (3, 6), (0, 1), (4, 5)):
        together[one, other] = together[other, one] = 50
    even = torch.full((2, 8), 30)
    layers = tuple(replace(one, coactivation=together, counts=even) for one in trace.layers)
    cluster = sample_cluster(2, 2)
    made = TwoLevel().plan(replace(trace, layers=layers), cluster).layers[0]
    nodes = [cluster.node(made.owner(e)) for e in range(8)]
    assert nodes[0] == nodes[5] == nodes[1] == nodes[4]
    assert nodes[2] == nodes[7] == nodes[3] == nodes[6] != nodes[0]


def test_groups_lie_whole_on_nodes() -> None:
    cluster = sample_cluster(2, 2)
    made = TwoLevel().plan(sample_trace(num_experts=8, num_groups=4), cluster).layers[0]
    assert [cluster.node(made.owner(e)) for e in range(8)] == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match="4 groups of experts, which 3 nodes cannot hold evenly"):
        TwoLevel().plan(sample_trace(num_experts=12, num_groups=4), sample_cluster(3, 1))


def test_no_node_has_more_than_its_slack_for_the_sake_of_locality() -> None:
    trace, cluster = sample_trace(2, num_experts=8), sample_cluster(2, 2)
    for layer, at in zip(trace.layers, TwoLevel(slack=1.2).plan(trace, cluster).layers, strict=True):
        loads = [0.0, 0.0]
        for expert in range(8):
            loads[cluster.node(at.owner(expert))] += float(layer.load[expert])
        assert max(loads) <= 1.2 * sum(loads) / 2
