"""Margins, temperatures and the diversity term against loops; how many experts run follows the threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from mixtura.methods.estimators import Passed, dense_routing
from mixtura.methods.estimators.ride import Ride

COUNTS = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)


def loss_by_loops(outputs: torch.Tensor, target: torch.Tensor, factor: float, late: bool) -> float:
    num = [float(n) for n in COUNTS]
    margin = [n**-0.25 for n in num]
    margin = [0.5 * m / max(margin) for m in margin]
    warm = [0.05 * 3 * n / sum(num) + 0.95 for n in num]
    warm = [t / max(warm) for t in warm] if late else [1.0] * 3
    weight = [(1 - 0.9999) / (1 - 0.9999**n) for n in num]
    weight = [3 * w / sum(weight) for w in weight] if late else [1.0] * 3
    mean, total = outputs.mean(0), 0.0
    for logits in outputs:
        top = bottom = apart = 0.0
        for row, label in enumerate(target.tolist()):
            z = [float(v) - (30 * margin[c] if c == label else 0) for c, v in enumerate(logits[row])]
            top += weight[label] * (math.log(sum(map(math.exp, z))) - z[label])
            bottom += weight[label]
            own = torch.softmax(logits[row] / torch.tensor(warm), -1)
            all_ = torch.softmax(mean[row] / torch.tensor(warm), -1)
            apart += sum(float(p * (p.log() - q.log())) for p, q in zip(all_, own, strict=True))
        total += top / bottom - factor * (sum(warm) / 3) ** 2 * apart / len(target)
    return total


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_the_loss_is_that_of_loops(progress: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 0])
    passed = Passed(
        output=outputs.mean(0),
        routing=dense_routing(torch.full((5, 2), 0.5)),
        outputs=outputs,
        more=COUNTS,
    )
    expected = loss_by_loops(outputs, target, 0.2, progress > 0.8)
    assert float(Ride(diversity=0.2).loss(passed, target, progress)) == pytest.approx(expected, rel=1e-6)


def test_the_mean_gets_no_gradient_from_diversity() -> None:
    from mixtura.methods.estimators._long_tail import diversity

    mean = torch.randn(4, 3, requires_grad=True)
    own = torch.randn(4, 3, requires_grad=True)
    diversity(own, mean, torch.ones(3)).backward()
    assert mean.grad is None
    assert own.grad is not None


def test_fewer_experts_run_as_the_threshold_rises() -> None:
    X, y = load_iris(return_X_y=True)
    model = Ride(epochs=5).fit(X, y)
    ran = [len(model.set_params(threshold=t).route(X).expert_ids) for t in (0.0, 0.3, 0.6, 1.0)]
    assert ran == sorted(ran, reverse=True)
    assert (ran[0], ran[-1]) == (450, 150)


def test_a_row_is_the_mean_of_the_experts_that_ran() -> None:
    X, y = load_iris(return_X_y=True)
    model = Ride(epochs=5, threshold=0.5).fit(X, y)
    net, x = model.module_, model.standardised(X)
    with torch.no_grad():
        h = net.features(x)
        each = torch.stack([expert(h) for expert in net.experts])
    routing = model.route(X)
    for row in (0, 60, 149):
        ran = routing.expert_ids[routing.token_ids == row].sort().values
        assert ran.tolist() == list(range(len(ran)))
        expected = each[: len(ran), row].mean(0).softmax(-1)
        assert np.allclose(model.predict_proba(X)[row], expected, atol=1e-6)
