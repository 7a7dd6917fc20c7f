"""What the placement adaptive promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts import sample_cluster
from mixtura.methods.placements.adaptive import Adaptive
from mixtura.types.placement import LayerPlacement

OWNED = LayerPlacement(index=0, devices=((0,), (1,), (2,), (3,)))


def test_it_switches_where_both_move_the_same_bytes() -> None:
    method, cluster = Adaptive(row_num_bytes=10), sample_cluster(1, 4)
    loads = torch.full((4, 4), 5.0)
    # By hand: 60 of 80 rows leave, there and back 1,200 bytes; four experts to three devices each are 12.
    assert method.step(OWNED, loads, 100, cluster) == OWNED
    assert method.step(OWNED, loads, 101, cluster) == OWNED
    assert [len(held) for held in method.step(OWNED, loads, 99, cluster).devices] == [4] * 4
