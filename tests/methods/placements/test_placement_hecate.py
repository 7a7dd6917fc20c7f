"""What the placement hecate promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts import sample_cluster
from mixtura.methods.placements.hecate import Hecate
from mixtura.types.placement import LayerPlacement

OWNED = LayerPlacement(index=0, devices=tuple((e // 2,) for e in range(8)))
LOADS = torch.tensor([[50.0, 5, 20, 1, 1, 1, 1, 1]] * 4)


def copies(then: LayerPlacement) -> list[int]:
    held = [0] * 4
    for devices in then.devices:
        for device in devices[1:]:
            held[device] += 1
    return held


def test_no_room_is_plain_expert_parallelism() -> None:
    assert Hecate(spare=0).step(OWNED, LOADS, 0, sample_cluster()).devices == OWNED.devices


def test_no_device_gets_more_copies_than_it_has_room_for() -> None:
    for spare in (1, 2, 3):
        then = Hecate(spare=spare).step(OWNED, LOADS, 0, sample_cluster())
        assert max(copies(then)) <= spare
        assert len(then.devices[0]) >= max(map(len, then.devices))


def test_what_can_be_sent_in_time_goes_everywhere_where_there_is_room() -> None:
    # Between nodes 1e9 bytes a second: in 3e-3 s three experts of 1e6 bytes.
    then = Hecate(spare=3, overlap_s=3.1e-3).step(OWNED, LOADS, 10**6, sample_cluster())
    assert [len(devices) for devices in then.devices] == [4, 4, 4, 1, 1, 1, 1, 1]


def test_other_nodes_come_first() -> None:
    cluster = sample_cluster(2, 2)
    hot = torch.zeros(4, 8)
    hot[:, 0], hot[:, 4] = 10.0, 10.0
    then = Hecate(spare=1).step(OWNED, hot, 0, cluster)
    assert cluster.node(then.devices[0][1]) == 1
    assert cluster.node(then.devices[4][1]) == 0
