"""How many experts the pruners' shared planning keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import BudgetError, UserError
from mixtura.methods.pruners._shared import keep_best, least_kept, num_bytes, num_kept
from mixtura.methods.pruners.frequency import Frequency
from mixtura.types import VLLM_ROUTER_COUNTS, Budget


@pytest.mark.parametrize(
    ("top_k", "num_groups", "top_groups", "expected"),
    [(2, 1, 1, 2), (8, 1, 1, 8), (8, 8, 4, 16), (6, 8, 3, 16), (6, 8, 1, 48), (1, 4, 4, 8)],
)
def test_least_kept(top_k: int, num_groups: int, top_groups: int, expected: int) -> None:
    trace = sample_trace(num_experts=64, top_k=top_k, num_groups=num_groups, top_groups=top_groups)
    assert least_kept(trace.layers[0]) == expected


def test_layers_of_different_size_share_one_number() -> None:
    trace = sample_trace(num_layers=2, num_experts=8)
    small = sample_trace(num_layers=2, num_experts=4).layers[1]
    mixed = replace(trace, layers=(trace.layers[0], small))
    assert num_bytes(mixed, 6) == (6 + 4) * 1000
    assert num_kept(mixed, Budget(num_bytes=10_999)) == 6
    scores = [layer.load.double() for layer in mixed.layers]
    plan = keep_best(mixed, Budget(num_experts=6), scores)
    assert {layer: len(experts) for layer, experts in plan.dropped().items()} == {0: 2}


def test_the_smallest_budget_in_bytes_is_named() -> None:
    trace = sample_trace(num_layers=3, num_experts=16, top_k=3, num_groups=4, top_groups=2)
    with pytest.raises(BudgetError, match="give at least 24000 bytes"):
        num_kept(trace, Budget(num_bytes=23_999))
    assert num_kept(trace, Budget(num_bytes=24_000)) == 8


def test_a_model_without_experts_needs_nothing() -> None:
    trace = replace(sample_trace(), layers=())
    assert keep_best(trace, Budget(num_bytes=0), []).actions == ()


def test_counts_are_those_that_groups_allow_too() -> None:
    trace = sample_trace(num_experts=96, top_k=2, num_groups=3, top_groups=1)
    for wanted, expected in ((95, 48), (48, 48), (47, 12), (96, 96)):
        assert num_kept(trace, Budget(num_experts=wanted, counts=(12, 32, 48, 64))) == expected
    with pytest.raises(BudgetError, match=r"numbers that a layer may have.*at least 12 per layer"):
        num_kept(trace, Budget(num_experts=11, counts=(4, 12, 32, 48, 64)))


def test_vllm_counts_round_down_and_leave_an_odd_model_whole() -> None:
    trace = sample_trace(num_experts=160, top_k=8)
    found = {
        n: num_kept(trace, Budget(num_experts=n, counts=VLLM_ROUTER_COUNTS)) for n in (160, 159, 127, 40, 8)
    }
    assert found == {160: 160, 159: 128, 127: 64, 40: 32, 8: 8}
    assert num_kept(trace, Budget(num_bytes=2 * 130 * 1000, counts=VLLM_ROUTER_COUNTS)) == 128


def test_protected_experts_need_room_in_their_group() -> None:
    trace = sample_trace(num_experts=16, top_k=2, num_groups=4, top_groups=2)
    protected = {0: (1,), 1: (4, 5, 7)}
    assert num_kept(trace, Budget(num_experts=13, protected=protected)) == 12
    with pytest.raises(BudgetError, match="protected experts need at least 12 in each layer"):
        num_kept(trace, Budget(num_experts=11, protected=protected))
    plan = Frequency().plan(trace, Budget(num_experts=12, protected=protected))
    assert not set(plan.dropped()[1]) & {4, 5, 7}


@pytest.mark.parametrize(
    ("protected", "message"), [({9: (1,)}, "layer 9 has no experts"), ({0: (8,)}, "no expert 8 to protect")]
)
def test_what_is_not_there_cannot_be_protected(protected: dict[int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Frequency().plan(sample_trace(), Budget(num_experts=4, protected=protected))
