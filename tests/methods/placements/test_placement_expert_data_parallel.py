"""What the placement expert_data_parallel promises beyond its kind's contract."""

from __future__ import annotations

import pytest

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import UserError
from mixtura.methods.placements.expert_data_parallel import ExpertDataParallel


def test_every_group_holds_every_expert_once() -> None:
    made = ExpertDataParallel().plan(sample_trace(num_experts=6), sample_cluster(3, 4)).layers[0]
    held = made.held(12)
    for group in range(3):
        together = sorted(e for device in range(4 * group, 4 * group + 4) for e in held[device])
        assert together == list(range(6))


def test_fewer_experts_than_a_node_has_devices() -> None:
    made = ExpertDataParallel().plan(sample_trace(num_experts=3), sample_cluster(1, 4)).layers[0]
    assert [len(held) for held in made.held(4)] == [2, 1, 2, 1]


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="groups of 3 devices do not divide 4"):
        ExpertDataParallel(degree=3).plan(sample_trace(), sample_cluster())
