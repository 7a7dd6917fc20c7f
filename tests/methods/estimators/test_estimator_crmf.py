"""Maps of curved spaces: each the inverse of the other, inside their space, flat where curvature vanishes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_linnerud

from mixtura.methods.estimators._geometry import (
    exp_ball,
    exp_sphere,
    log_ball,
    log_sphere,
    mobius_add,
)
from mixtura.methods.estimators.crmf import Crmf

V = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("c", [0.01, 1.0, 3.0])
def test_logarithm_undoes_the_exponential(c: float) -> None:
    short = V / (4 * c**0.5)
    assert torch.allclose(log_ball(exp_ball(short, c), c), short)
    assert torch.allclose(log_sphere(exp_sphere(short, c), c), short)
    assert bool((exp_ball(1e3 * V, c).norm(dim=-1) < 1 / c**0.5).all())
    assert torch.allclose(exp_sphere(V, c).norm(dim=-1), torch.ones(20, dtype=torch.float64))


def test_the_sum_of_the_ball_by_its_formula() -> None:
    x, y, c = (0.3 * V[0]).tolist(), (0.2 * V[1]).tolist(), 0.7
    dot, xx, yy = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, y), (x, x), (y, y)))
    below = 1 + 2 * c * dot + c * c * xx * yy
    first, second = (1 + 2 * c * dot + c * yy) / below, (1 - c * xx) / below
    expected = [first * a + second * b for a, b in zip(x, y, strict=True)]
    assert np.allclose(mobius_add(0.3 * V[:1], 0.2 * V[1:2], c)[0], expected)


def test_distances_from_the_pole_are_lengths() -> None:
    v = torch.tensor([[3.0, 4.0]], dtype=torch.float64) / 10
    assert math.isclose(math.acos(float(exp_sphere(v, 1.0)[0, 0])), 0.5)
    assert math.isclose(2 * math.atanh(float(exp_ball(v, 1.0).norm())), 1.0)


def test_without_curvature_all_experts_are_flat() -> None:
    X, y = load_linnerud(return_X_y=True)
    model = Crmf(curvature=1e-6, epochs=2).fit(X, y)
    net = model.module_
    h = net.features(model.standardised(X))
    ball = model.run(X).outputs[0]
    assert torch.allclose(ball, net.ball(h), atol=1e-4)


def test_gradients_are_finite_at_the_centre() -> None:
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (log_ball(exp_ball(zero, 1.0), 1.0) + log_sphere(exp_sphere(zero, 1.0), 1.0)).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_several_numbers_at_once() -> None:
    X, y = load_linnerud(return_X_y=True)
    model = Crmf(epochs=3).fit(X, y)
    assert model.predict(X).shape == y.shape
    weights = model.route(X).scores
    assert torch.allclose(weights.sum(-1), torch.ones(len(X), dtype=torch.float64))
