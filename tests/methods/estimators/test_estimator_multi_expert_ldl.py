"""The discrepancy against loops; components add up; samples have the spread that was learned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixtura.methods.estimators import windows
from mixtura.methods.estimators._series import kernel_score
from mixtura.methods.estimators.multi_expert_ldl import MultiExpertLdl, shapes


def test_the_score_is_that_of_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    target = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    gaps = [float(((samples[n, i] - samples[n, j]) ** 2).sum()) for n in range(3) for i, j in pairs]
    middle = float(torch.tensor(gaps, dtype=torch.float64).median())
    for row in range(3):
        total = 0.0
        for factor in (0.25, 0.5, 1, 2, 4):
            width = factor * middle
            apart = [float(((samples[row, i] - samples[row, j]) ** 2).sum()) for i, j in pairs]
            within = [math.exp(-one / width) for one in apart]
            near = [math.exp(-float(((one - target[row]) ** 2).sum()) / width) for one in samples[row]]
            total += sum(within) / 12 - 2 * sum(near) / 4 + 1
        assert float(kernel_score(samples, target)[row]) == pytest.approx(total / 5)


def test_the_score_is_least_for_the_right_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(4000, 8, 1, generator=generator, dtype=torch.float64)
    # One bandwidth for all spreads: that of the middle of the three.
    found = [float(kernel_score(torch.cat([scale * noise, noise]), target.repeat(2, 1))[:4000].mean())
             for scale in (0.3, 1.0, 3.0)]  # fmt: skip
    assert found[1] == min(found)


def test_shapes_are_powers_waves_and_steps() -> None:
    powers, waves, steps, none = shapes(8, 2)
    time = np.arange(1, 9) / 8
    assert np.allclose(powers, [np.ones(8), time, time**2])
    assert np.allclose(waves[1], np.sin(4 * np.pi * time))
    assert steps.sum(1).tolist() == [8, 6, 4, 2]
    assert not none.any()


def test_the_forecast_is_the_weighted_sum_of_what_experts_say() -> None:
    X, y = windows(np.sin(np.arange(120) / 5), past=8, future=4)
    model = MultiExpertLdl(epochs=2).fit(X, y)
    passed, x = model.run(X), model.standardised(X)
    for row in (0, 50):
        parts = sum(w * o for w, o in zip(passed.routing.scores[row], passed.outputs[:, row], strict=True))
        assert torch.allclose(passed.output[row], x[row, -1] + parts)


def test_samples_spread_as_the_noise() -> None:
    noise = np.random.default_rng(0).normal(size=1200)
    X, y = windows(noise, past=6, future=2)
    model = MultiExpertLdl(epochs=15).fit(X, y)
    drawn = model.sample(X[:100], 200)
    assert drawn.shape == (200, 100, 2)
    assert 0.8 < drawn.std(0).mean() < 1.2
    assert np.array_equal(drawn, model.sample(X[:100], 200))
    assert not np.array_equal(drawn, model.sample(X[:100], 200, seed=1))
