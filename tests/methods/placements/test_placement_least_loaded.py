"""What the placement least_loaded promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts import sample_cluster
from mixtura.authoring.contracts.placements import rows_of
from mixtura.methods.placements.least_loaded import LeastLoaded
from mixtura.types.placement import LayerPlacement

OWNED = LayerPlacement(index=0, devices=tuple((e // 2,) for e in range(8)))


def test_no_device_has_more_than_its_capacity() -> None:
    cluster, generator = sample_cluster(), torch.Generator().manual_seed(0)
    for _ in range(20):
        loads = torch.randint(0, 400, (4, 8), generator=generator).double()
        loads[:, 0] *= 10
        then = LeastLoaded(most=1.1, least_rows=1).step(OWNED, loads, 0, cluster)
        assert float(rows_of(then, loads, cluster).max()) <= 1.1 * float(loads.sum()) / 4 + 1e-6


def test_a_large_capacity_or_ratio_is_plain_expert_parallelism() -> None:
    loads = torch.tensor([[900.0, 1, 1, 1, 1, 1, 1, 1]] * 4)
    assert set(LeastLoaded(most=100.0).step(OWNED, loads, 0, sample_cluster()).devices) == set(OWNED.devices)
    assert LeastLoaded(ratio=4.0).step(OWNED, loads, 0, sample_cluster()) == OWNED


def test_small_pieces_are_not_sent() -> None:
    # 160 rows, capacity 44: helpers have room for 34 each, and the last piece may be small.
    loads = torch.tensor([[120.0, 10, 10, 0, 10, 0, 10, 0]])
    small = LeastLoaded(least_rows=1).step(OWNED, loads, 0, sample_cluster())
    assert small.devices[0] == (0, 1, 2, 3)
    rows = [round(share * 120) for share in small.shares[0]]
    assert rows == [34, 34, 34, 18]
    # A piece of 50 rows fits no helper: what the owner cannot take goes to the least loaded at once.
    large = LeastLoaded(least_rows=50).step(OWNED, loads, 0, sample_cluster())
    assert large.devices[0] == (0, 1)
    assert [round(share * 120) for share in large.shares[0]] == [34, 86]


def test_an_owner_that_is_full_hands_all_of_an_expert_on() -> None:
    loads = torch.tensor([[100.0, 90.0, 1, 0, 1, 0, 1, 0]])
    then = LeastLoaded(most=1.0, least_rows=1).step(OWNED, loads, 0, sample_cluster())
    assert then.owner(1) == 0
    assert sum(then.shares[1]) == 1.0
    assert float(rows_of(then, loads, sample_cluster()).max()) <= 193 / 4 + 1e-6
