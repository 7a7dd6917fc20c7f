"""What the analysis super_experts promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.super_experts import SuperExperts
from mixtura.types.trace import Trace


def trace_of(largest: dict[tuple[int, int], float], num_layers: int = 4, num_experts: int = 100) -> Trace:
    """Layers whose experts' largest outputs are 1, but for some given by layer and expert."""
    trace = sample_trace(num_layers=num_layers, num_experts=num_experts).of("code")
    layers = []
    for layer in trace.layers:
        values = torch.ones(1, num_experts)
        for (index, expert), value in largest.items():
            if index == layer.index:
                values[0, expert] = value
        layers.append(replace(layer, statistics={"max_output": values}))
    return replace(trace, layers=tuple(layers))


def test_both_bounds_hold_and_late_layers_are_left_out() -> None:
    # The last layer's experts are not looked at, not even as the largest. The bounds of the 300 others are
    # the percentile, between 1 and 50, and a tenth of the largest, 50.
    trace = trace_of({(0, 7): 50.0, (1, 3): 500.0, (3, 9): 9000.0})
    assert SuperExperts().find(trace) == {1: (3,)}
    assert SuperExperts(share_of_largest=0.05).find(trace) == {0: (7,), 1: (3,)}
    assert SuperExperts(share_of_largest=0.05, percentile=99.8).find(trace) == {1: (3,)}
    assert SuperExperts(share_of_layers=1.0).find(trace) == {3: (9,)}


def test_the_largest_of_a_flat_model_is_not_super() -> None:
    assert SuperExperts().find(trace_of({})) == {}


def test_the_report_counts_them() -> None:
    report = SuperExperts().measure(Evidence.of(trace_of({(1, 3): 500.0})))
    assert report.scalars == {"super_experts": 1}
    assert [row["super_experts"] for row in report.rows] == [0, 1, 0, 0]
    assert [row["largest_output"] for row in report.rows] == [1.0, 500.0, 1.0, 1.0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_of_no_layers_has_none(share: float) -> None:
    trace = replace(sample_trace(), layers=())
    assert SuperExperts(share_of_layers=share).find(trace) == {}
