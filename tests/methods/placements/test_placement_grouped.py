"""What the placement grouped promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.authoring.contracts.placements import rows_of
from mixtura.errors import UserError
from mixtura.methods.placements.grouped import Grouped


def test_choosing_evenly_by_group_loads_evenly() -> None:
    cluster = sample_cluster()
    layer = Grouped().plan(sample_trace(num_experts=16, num_groups=8), cluster).layers[0]
    generator = torch.Generator().manual_seed(0)
    loads = torch.zeros(4, 16)
    for token in range(200):
        # A token chooses one expert in each group of two, never mind which.
        for group in range(8):
            loads[token % 4, 2 * group + int(torch.rand(1, generator=generator) < 0.9)] += 1
    assert rows_of(layer, loads, cluster).tolist() == [400.0] * 4


def test_groups_that_cannot_be_dealt_are_refused() -> None:
    trace = sample_trace(num_experts=12, num_groups=6)
    with pytest.raises(UserError, match="12 experts in 6 groups, which 4 devices cannot hold evenly"):
        Grouped().plan(trace, sample_cluster())
    assert Grouped(groups=4).plan(trace, sample_cluster()).layers[0].held(4)[3] == (9, 10, 11)


def test_groups_that_were_asked_for_and_that_no_experts_make_are_refused() -> None:
    trace = sample_trace(num_experts=6)
    with pytest.raises(UserError, match="6 experts in 4 groups, which 4 devices cannot hold evenly"):
        Grouped(groups=4).plan(trace, sample_cluster())
    assert [len(held) for held in Grouped().plan(trace, sample_cluster()).layers[0].held(4)] == [2, 2, 1, 1]
