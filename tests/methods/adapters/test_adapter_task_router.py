"""What the adapter task_router promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from methods.adapters.adapter_inputs import SEQUENCES, VALID, X, given, prompt_means, softmax, stirred

from mixtura.adapting.changing import add_to_rows


def test_task_router_leaves_the_base_alone_or_learns_a_task() -> None:
    made = stirred("task_router", rank=3, task=1, guidance=0.5)
    with torch.no_grad():
        made.layers[0].zero_()
        made.layers[0][0] = prompt_means(X)[0]
    change = made.change(given())
    # The first sequence is the base's own; what is added to it is exactly nothing.
    assert not change.shares[:4].any()
    base = torch.randn(7, 20, dtype=torch.float64)
    assert torch.equal(add_to_rows(base, X, change, None)[:4], base[:4])
    learned = made.change(given(training=True))
    assert (learned.shares == torch.tensor([0.0, 1.0, 0.0])).all()
    apart = []
    for token in range(7):
        if VALID[token]:
            mean = prompt_means(X)[int(SEQUENCES[token])]
            apart.append(-math.log(softmax((made.layers[0] @ mean).tolist())[2]))
    assert learned.losses["task"].item() == pytest.approx(0.5 * sum(apart) / len(apart))
