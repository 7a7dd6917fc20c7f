"""What the pruner frequency promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.pruners.frequency import Frequency
from mixtura.types import Budget


def test_counts_of_all_domains_are_added() -> None:
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    layer = replace(trace.layers[0], counts=torch.tensor([[9, 1, 5, 0], [0, 9, 1, 7]]))
    plan = Frequency().plan(replace(trace, layers=(layer,)), Budget(num_experts=2))
    assert plan.dropped() == {0: (2, 3)}


def test_of_equal_counts_the_lowest_index_is_kept() -> None:
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    layer = replace(trace.layers[0], counts=torch.full((2, 4), 3))
    plan = Frequency().plan(replace(trace, layers=(layer,)), Budget(num_experts=3))
    assert plan.dropped() == {0: (3,)}


def test_budgets_that_are_no_multiple_of_the_groups_are_rounded_down() -> None:
    trace = sample_trace(num_layers=1, num_experts=16, top_k=2, num_groups=4, top_groups=2)
    for kept, expected in ((16, 16), (15, 12), (12, 12), (11, 8), (8, 8)):
        plan = Frequency().plan(trace, Budget(num_experts=kept))
        assert 16 - len(plan.dropped().get(0, ())) == expected
