"""Linear experts that a sigmoid chooses, against a loop; the gate learns from the balance loss alone."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_iris

from mixtura.methods.estimators.uatr_cmoe import UatrCmoe


def test_each_row_has_its_best_expert_and_the_shared_one() -> None:
    X, y = load_iris(return_X_y=True)
    model = UatrCmoe(num_experts=3, epochs=5).fit(X, y)
    net = model.module_
    x = torch.from_numpy((X - X.mean(0)) / X.std(0))
    logits = []
    for row in x:
        h = torch.relu(net.features[0][0].weight @ row + net.features[0][0].bias)
        best = int(torch.argmax(torch.sigmoid(net.gate.weight.double() @ h)))
        logits.append(net.experts[best](h) + net.shared(h))
    expected = torch.stack(logits).softmax(-1).detach().numpy()
    assert np.allclose(model.predict_proba(X), expected, atol=1e-6)


def test_the_gate_learns_from_the_balance_alone() -> None:
    X, y = load_iris(return_X_y=True)
    start = UatrCmoe(epochs=1, learning_rate=0.0).fit(X, y).module_.gate.weight
    still = UatrCmoe(epochs=3, balance=0.0).fit(X, y).module_.gate.weight
    moved = UatrCmoe(epochs=3, balance=1.0).fit(X, y).module_.gate.weight
    assert torch.allclose(still, start, atol=1e-6)
    assert not torch.allclose(moved, start, atol=1e-3)


def test_one_expert_is_a_linear_head() -> None:
    X, y = load_iris(return_X_y=True)
    model = UatrCmoe(num_experts=1, residual=False, epochs=3).fit(X, y)
    h = model.module_.features(model.standardised(X))
    expected = model.module_.experts[0](h).softmax(-1).detach().numpy()
    assert np.allclose(model.predict_proba(X), expected)
