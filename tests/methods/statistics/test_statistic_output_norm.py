"""What the statistic output_norm promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.statistics.output_norm import OutputNorm


def test_weights_and_inputs_do_not_matter() -> None:
    outputs = torch.tensor([[3.0, 4.0], [-6.0, 8.0]])
    statistic = OutputNorm()
    first = statistic.measure(torch.zeros(2, 2), outputs, torch.zeros(2))
    second = statistic.measure(torch.ones(2, 2), outputs, torch.ones(2))
    assert first.tolist() == second.tolist() == [5.0, 10.0]
