"""What the statistic weighted_output_norm promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.statistics.output_norm import OutputNorm
from mixtura.methods.statistics.weighted_output_norm import WeightedOutputNorm


def test_is_the_norm_of_what_the_expert_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(9, 5, generator=generator)
    weights = torch.rand(9, generator=generator)
    found = WeightedOutputNorm().measure(outputs, outputs, weights)
    torch.testing.assert_close(found, (weights[:, None] * outputs).norm(dim=1))


def test_the_mean_of_products_is_not_the_product_of_means() -> None:
    # One token with a long output and a small weight, one the other way round.
    outputs = torch.tensor([[10.0], [1.0]])
    weights = torch.tensor([0.1, 0.9])
    mean = WeightedOutputNorm().measure(outputs, outputs, weights).mean().item()
    product = weights.mean().item() * OutputNorm().measure(outputs, outputs, weights).mean().item()
    assert mean == pytest.approx(0.95)
    assert product == pytest.approx(2.75)
