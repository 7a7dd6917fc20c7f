"""What the placement random promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.methods.placements.random import Random


def test_seeds_and_layers_differ() -> None:
    trace, cluster = sample_trace(num_experts=32), sample_cluster()
    one, other = (Random(seed=seed).plan(trace, cluster) for seed in (0, 1))
    assert one.layers[0].devices != other.layers[0].devices
    assert one.layers[0].devices != one.layers[1].devices
