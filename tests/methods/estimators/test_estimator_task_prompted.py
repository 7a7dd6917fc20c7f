"""Copies of one expert are one network; the router is told the task; hidden columns come first."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators.task_prompted import TaskPrompted


def lessons(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(seed).normal(size=(120, 5))
    y = np.stack([X[:, 0] > 0, X[:, 0] + X[:, 1] > 1, X[:, 2] > 0], axis=1).astype(float)
    y[40:, 1] = np.nan
    return X, y


def test_a_forward_by_loops() -> None:
    torch.manual_seed(0)
    module = TaskPrompted(num_experts=3, top_k=2, d_hidden=6, noise=1.0).build(5, 2).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    passed = module(x)
    made = passed.output.detach()
    for row in range(4):
        h = module.embed(x[row]).relu()
        for task in range(2):
            logits = module.gate.weight.double() @ torch.cat([h, module.prompts[task]])
            scores = [math.exp(one) for one in logits.tolist()]
            best = sorted(range(3), key=lambda e: -scores[e])[:2]
            total = sum(scores[e] for e in best)
            z = h + sum(scores[e] / total * module.experts[e](h) for e in best)
            expected = float((z.relu() * module.heads[task]).sum().detach() + module.biases[task].detach())
            assert float(made[row, task]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_equal_copies_are_one_network(top_k: int) -> None:
    torch.manual_seed(0)
    many = TaskPrompted(num_experts=4, top_k=top_k, noise=0.0).build(5, 3)
    x = torch.randn(9, 5)
    h = many.embed(x).relu()
    z = (h + many.experts[2](h)).relu()
    assert torch.allclose(many(x).output, z @ many.heads.T + many.biases, atol=1e-5)


def test_tasks_of_a_row_may_have_other_experts() -> None:
    X, y = lessons()
    model = TaskPrompted(num_experts=4, top_k=1, epochs=10).fit(X, y)
    routing = model.route(X)
    taken = torch.empty(len(X) * 3, dtype=torch.long)
    taken[routing.token_ids] = routing.expert_ids
    by_task = taken.reshape(-1, 3)
    assert (by_task[:, 0] != by_task[:, 2]).any()
    with torch.no_grad():
        model.module_.prompts.zero_()
    routing = model.route(X)
    taken[routing.token_ids] = routing.expert_ids
    assert (taken.reshape(-1, 3) == taken.reshape(-1, 3)[:, :1]).all()


def test_hidden_columns_are_filled_in_before_labels_are_seen() -> None:
    generator = np.random.default_rng(1)
    X = generator.normal(size=(200, 1)) * np.ones((1, 6)) + 0.1 * generator.normal(size=(200, 6))
    y = (X[:, :2] > 0).astype(float)
    made = TaskPrompted(first_epochs=20, epochs=1, learning_rate=0.01, hidden=0.3)
    module = made.build(6, 2)
    x = torch.from_numpy(X).float()
    torch.manual_seed(0)
    before = float(made._fill_in(module, x).detach())
    heads = module.heads.clone()
    made.prepare(module, x, torch.from_numpy(y))
    torch.manual_seed(0)
    assert float(made._fill_in(module, x).detach()) < 0.3 * before
    assert torch.equal(module.heads, heads)


def test_labels_that_are_missing_are_not_learned() -> None:
    X, y = lessons()
    model = TaskPrompted(epochs=3, first_epochs=2).fit(X, y)
    again = TaskPrompted(epochs=3, first_epochs=2).fit(X, y.astype(np.float32))
    assert np.array_equal(model.predict_proba(X), again.predict_proba(X))
    assert model.predict(X).shape == (120, 3)
    assert TaskPrompted(epochs=30).fit(X, y).score(X, y) > 0.9


def test_bad_settings_and_labels_are_refused() -> None:
    X, y = lessons()
    with pytest.raises(SettingError, match="top_k"):
        TaskPrompted(top_k=9).fit(X, y)
    with pytest.raises(SettingError, match="hidden of TaskPrompted must be in"):
        TaskPrompted(hidden=1.5).fit(X, y)
    with pytest.raises(UserError, match="labels of TaskPrompted are 0, 1, or NaN"):
        TaskPrompted().fit(X, 2 * y)
    with pytest.raises(UserError, match="one class alone; leave it out"):
        TaskPrompted().fit(X, np.zeros((120, 2)))
