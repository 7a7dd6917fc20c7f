"""What the placement round_robin promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.methods.placements.round_robin import RoundRobin


def test_more_devices_than_experts() -> None:
    made = RoundRobin().plan(sample_trace(num_experts=3), sample_cluster(2, 2))
    assert [layer.held(4) for layer in made.layers] == [((0,), (1,), (2,), ())] * 2
