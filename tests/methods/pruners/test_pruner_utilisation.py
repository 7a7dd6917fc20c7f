"""What the pruner utilisation promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import SettingError
from mixtura.methods import create
from mixtura.methods.pruners.frequency import Frequency
from mixtura.methods.pruners.utilisation import Utilisation
from mixtura.types import Budget
from mixtura.types.trace import Trace


def trace_of(counts: list[list[int]]) -> Trace:
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    return replace(trace, layers=(replace(trace.layers[0], counts=torch.tensor(counts)),))


def dropped(trace: Trace, kept: int, over: Literal["mean", "max"]) -> tuple[int, ...]:
    return Utilisation(over_domains=over).plan(trace, Budget(num_experts=kept)).dropped()[0]


def test_a_short_domain_counts_as_much_as_a_long_one() -> None:
    # The second domain is a hundredth of the text, and all of it goes to expert 3.
    trace = trace_of([[400, 350, 250, 0], [0, 0, 0, 10]])
    assert Frequency().plan(trace, Budget(num_experts=3)).dropped() == {0: (3,)}
    assert dropped(trace, 3, "mean") == (2,)


def test_the_largest_share_keeps_the_specialists() -> None:
    # Shares: 0.6 0.3 0.1 0 and 0.1 0.35 0 0.55: the means drop expert 3, the largest shares expert 1.
    trace = trace_of([[60, 30, 10, 0], [10, 35, 0, 55]])
    assert dropped(trace, 2, "mean") == (2, 3)
    assert dropped(trace, 2, "max") == (1, 2)


def test_another_word_is_refused() -> None:
    with pytest.raises(SettingError, match="over_domains"):
        create("pruners", "utilisation", over_domains="sum")
