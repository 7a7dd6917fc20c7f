"""How many experts the pruners' shared planning keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import BudgetError
from mixtura.methods.pruners._shared import keep_best, least_kept, num_bytes, num_kept
from mixtura.types import Budget


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
