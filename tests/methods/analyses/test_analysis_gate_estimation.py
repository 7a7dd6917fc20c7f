"""What the analysis gate_estimation promises beyond its kind's contract."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from mixtura.methods.analyses import Cell, Evidence
from mixtura.methods.analyses._gaussian import TRUTH, drawn, log_likelihood
from mixtura.methods.analyses.gate_estimation import GateEstimation

Rows = tuple[Mapping[str, Cell], ...]


def runs(rows: Rows) -> Evidence:
    return Evidence(runs=rows)


def without(rows: Rows, name: str) -> Rows:
    return tuple({key: value for key, value in row.items() if key != name} for row in rows)


class TestGateEstimation:
    def test_the_likelihood_is_that_of_a_plain_computation(self) -> None:
        x, y = drawn(5, "activation", torch.Generator().manual_seed(0))
        total = 0.0
        for one, other in zip(x.tolist(), y.tolist(), strict=True):
            logit = TRUTH[0] * one + TRUTH[1] + TRUTH[2] * one * one
            pair = [1 / (1 + math.exp(-logit)) / math.exp(TRUTH[3]), 0.5 / math.exp(TRUTH[3])]
            shares = [math.exp(value) / sum(map(math.exp, pair)) for value in pair]
            spread = math.exp(TRUTH[8])
            normal = [
                math.exp(-0.5 * ((other - TRUTH[4 + i] * one - TRUTH[6 + i]) / spread) ** 2)
                / (spread * math.sqrt(2 * math.pi))
                for i in range(2)
            ]
            total += math.log(sum(a * b for a, b in zip(shares, normal, strict=True)))
        truth = torch.tensor(TRUTH, dtype=torch.float64)
        assert float(log_likelihood(truth, x, y, "activation")) == pytest.approx(total)

    def test_experts_are_learnt_at_the_parametric_rate(self) -> None:
        found = GateEstimation(sizes=[200, 3200], repeats=7).measure(Evidence()).scalars
        assert found["experts_activation"] == pytest.approx(-0.5, abs=0.3)
        assert found["slope_temperature"] is not None
        assert found["slope_activation"] is not None
        assert found["slope_temperature"] > found["slope_activation"] + 0.15
