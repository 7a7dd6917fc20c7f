"""Evidence by numerical means; critics see what their expert saw, and do not shape it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.methods.estimators._evidence import squared_error, wrong_evidence
from mixtura.methods.estimators.evidence_moe import EvidenceMoe

ALPHA = torch.tensor([[3.0, 1.5], [1.0, 1.0]], dtype=torch.float64)
WANTED = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def test_the_expected_error_is_that_of_draws() -> None:
    drawn = np.random.default_rng(0).dirichlet(ALPHA[0].numpy(), 200_000)
    expected = ((drawn - WANTED[0].numpy()) ** 2).sum(1).mean()
    assert float(squared_error(ALPHA, WANTED)[0]) == pytest.approx(expected, abs=2e-3)


def test_the_divergence_is_pytorchs() -> None:
    left = WANTED + (1 - WANTED) * ALPHA
    nothing = torch.distributions.Dirichlet(torch.ones(2, 2, dtype=torch.float64))
    expected = torch.distributions.kl_divergence(torch.distributions.Dirichlet(left), nothing)
    assert torch.allclose(wrong_evidence(ALPHA, WANTED), expected)


def decays(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    rates = generator.uniform(0.5, 3, num)
    clean = np.exp(-rates[:, None] * np.linspace(0, 2, 16))
    return generator.poisson(200 * clean) / 200, rates


def test_noise_in_the_late_part_costs_its_expert_trust() -> None:
    X, y = decays(400, 0)
    # The late half of every other row is noise, which its critic can see.
    noisy = np.arange(400) % 2 == 0
    X[noisy, 8:] = np.random.default_rng(1).uniform(0, 1, (int(noisy.sum()), 8))
    model = EvidenceMoe(epochs=30).fit(X, y)
    late = model.qualities(X)[:, 1]
    assert late[noisy].mean() < 0.8 * late[~noisy].mean()


def test_the_output_by_a_loop() -> None:
    X, y = decays(40, 2)
    model = EvidenceMoe(epochs=3).fit(X, y)
    net, x, passed = model.module_, model.standardised(X), model.run(X)
    for row in (0, 7):
        facts, corrected = [], []
        for expert, critic, part in zip(net.experts, net.critics, net.parts, strict=True):
            said = expert(x[row, part])
            judged = critic(torch.cat([x[row, part], said]))
            good, bad = 1 + torch.nn.functional.softplus(judged[:2])
            facts += [good / (good + bad), 2 / (good + bad), said[0]]
            corrected.append(said + judged[2:])
        weights = net.decider(torch.stack(facts)).softmax(-1)
        expected = sum(w * c for w, c in zip(weights, corrected, strict=True))
        assert torch.allclose(passed.output[row], expected)


def test_critics_do_not_shape_predictions() -> None:
    X, y = decays(40, 3)
    model = EvidenceMoe(epochs=1).fit(X, y)
    model.module_.zero_grad(set_to_none=True)
    model.module_(model.standardised(X)).more.sum().backward()
    assert all(weight.grad is None for weight in model.module_.experts.parameters())
