"""What the placement contiguous promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.methods.placements.contiguous import Contiguous


def test_what_does_not_divide_goes_to_the_first() -> None:
    made = Contiguous().plan(sample_trace(num_experts=7), sample_cluster(1, 3))
    assert made.layers[0].held(3) == ((0, 1, 2), (3, 4), (5, 6))
