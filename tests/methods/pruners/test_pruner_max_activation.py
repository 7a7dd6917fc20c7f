"""What the pruner max_activation promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.pruners.max_activation import MaxActivation
from mixtura.types import Budget


def test_one_extreme_value_in_one_domain_is_enough() -> None:
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    layer = replace(
        trace.layers[0],
        counts=torch.tensor([[100, 100, 100, 1], [100, 100, 100, 0]]),
        statistics={"max_output": torch.tensor([[3.0, 2.0, 1.0, 90.0], [3.0, 4.0, 1.0, 0.0]])},
    )
    plan = MaxActivation().plan(replace(trace, layers=(layer,)), Budget(num_experts=2))
    assert plan.dropped() == {0: (0, 2)}
