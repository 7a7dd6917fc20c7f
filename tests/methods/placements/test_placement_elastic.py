"""What the placement elastic promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.authoring.contracts.placements import rows_of
from mixtura.methods.placements import loads_of
from mixtura.methods.placements.elastic import Elastic
from mixtura.types.trace import Trace


def hot_trace() -> Trace:
    """One expert has half of all there is to do."""
    trace = sample_trace(num_experts=8)
    counts = torch.full((2, 8), 20)
    counts[:, 3] = 140
    return replace(trace, layers=tuple(replace(one, counts=counts, choices=None) for one in trace.layers))


def test_the_hot_expert_is_shared_until_nothing_is_gained() -> None:
    trace, cluster = hot_trace(), sample_cluster(1, 4)
    loads = loads_of(trace, trace.layers[0], 4)
    most = []
    for spare in (0, 1, 4):
        layer = Elastic(spare=spare).plan(trace, cluster).layers[0]
        most.append(float(rows_of(layer, loads, cluster).max()))
        copies = [sum(device in held[1:] for held in layer.devices) for device in range(4)]
        assert max(copies) <= spare
    # 560 assignments, 280 of them one expert's: alone it decides, shared by all devices nothing does.
    assert most[0] >= 280
    assert most[1] < most[0]
    assert most[2] <= 160
