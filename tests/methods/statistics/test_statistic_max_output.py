"""What the statistic max_output promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.statistics.max_output import MaxOutput


def test_a_large_negative_value_counts_and_weights_do_not() -> None:
    outputs = torch.tensor([[1.0, -9.0, 2.0], [0.5, 0.25, 0.0]])
    for weights in (torch.zeros(2), torch.ones(2)):
        assert MaxOutput().measure(torch.zeros(2, 3), outputs, weights).tolist() == [9.0, 0.5]
