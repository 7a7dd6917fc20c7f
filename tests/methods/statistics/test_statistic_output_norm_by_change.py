"""What the statistic output_norm_by_change promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.statistics import LayerTokens
from mixtura.methods.statistics.output_norm_by_change import OutputNormByChange


def factor(residual: list[float], routed: list[float]) -> float:
    tokens = LayerTokens(
        chosen=torch.tensor([[0, 1]]),
        weights=torch.ones(1, 2),
        residual=torch.tensor([residual]),
        routed=torch.tensor([routed]),
    )
    first, second = OutputNormByChange().factor(tokens)[0].tolist()
    assert first == second
    return float(first)


def test_only_turning_counts() -> None:
    assert factor([3.0, 0.0], [0.0, 3.0]) == pytest.approx(1 - math.cos(math.pi / 4))
    assert factor([3.0, 0.0], [6.0, 0.0]) == pytest.approx(0.0, abs=1e-6)
    assert factor([3.0, 0.0], [-6.0, 0.0]) == pytest.approx(2.0)


def test_rounding_never_makes_it_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(1000, 64, generator=generator)
    tokens = LayerTokens(
        chosen=torch.zeros(1000, 1, dtype=torch.int64),
        weights=torch.ones(1000, 1),
        residual=residual,
        routed=1e-9 * residual,
    )
    assert float(OutputNormByChange().factor(tokens).min()) >= 0


def test_the_norm_is_of_the_weighted_output() -> None:
    outputs = torch.tensor([[3.0, 4.0]])
    assert OutputNormByChange().measure(outputs, outputs, torch.tensor([0.5])).tolist() == [2.5]
