"""What the merger average promises beyond its kind's contract."""

from __future__ import annotations

import pytest

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.mergers.average import Average
from mixtura.types import Budget, Merge, Plan


def groups_of(plan: Plan) -> list[Merge]:
    return [action for action in plan.actions if isinstance(action, Merge)]


def test_groups_are_of_about_one_size_and_drawn_by_the_seed() -> None:
    trace = sample_trace(num_experts=8)
    sizes = sorted(len(one.experts) for one in groups_of(Average().plan(trace, Budget(num_experts=3))))
    assert sizes == [2, 2, 3, 3, 3, 3]
    same, other = (Average(seed=seed).plan(trace, Budget(num_experts=3)) for seed in (0, 1))
    assert Average().plan(trace, Budget(num_experts=3)) == same != other


def test_use_weighs_members_where_it_is_asked_for() -> None:
    trace = sample_trace(num_layers=1, num_experts=8)
    plain = groups_of(Average().plan(trace, Budget(num_experts=4)))
    used = groups_of(Average(by_use=True).plan(trace, Budget(num_experts=4)))
    load = trace.layers[0].load.tolist()
    for one, other in zip(plain, used, strict=True):
        assert one.experts == other.experts
        assert one.shares == (0.5, 0.5)
        total = sum(load[expert] for expert in other.experts)
        assert other.shares == pytest.approx([load[expert] / total for expert in other.experts])
        assert load[one.experts[0]] >= load[one.experts[1]]
