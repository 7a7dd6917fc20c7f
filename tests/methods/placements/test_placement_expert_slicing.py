"""What the placement expert_slicing promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import UserError
from mixtura.methods.placements.expert_slicing import ExpertSlicing


def test_layers_of_a_pyramid_get_what_their_numbers_allow() -> None:
    few, many = sample_trace(num_experts=2), sample_trace(num_experts=8)
    trace = replace(few, layers=(few.layers[0], many.layers[1]))
    first, second = ExpertSlicing().plan(trace, sample_cluster(2, 4)).layers
    assert (first.parts, first.devices) == (4, ((0, 1, 2, 3), (4, 5, 6, 7)))
    assert (second.parts, second.devices) == (1, tuple((e,) for e in range(8)))


def test_parts_that_divide_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="3 parts divide neither or only one of 4 devices and 32"):
        ExpertSlicing(parts=3).plan(sample_trace(), sample_cluster())
