"""ScaleZero's layer by loops, heads by task, and the gradients of tasks that pull apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators.scale_zero import ScaleZero

GENERATOR = np.random.default_rng(3)
X = GENERATOR.normal(size=(240, 5))
TASK = np.array(["a", "b", "c"])[GENERATOR.integers(0, 3, 240)]
Y = np.stack([np.where(TASK == "a", X[:, 0], -X[:, 0]), X[:, 1] * (TASK == "c")], axis=1)


def test_the_network_by_loops() -> None:
    model = ScaleZero(num_experts=3, num_layers=2, d_model=6, epochs=2).fit(X, Y, groups=TASK)
    net = model.module_
    said = model.predict(X[:20], groups=TASK[:20])
    for row in range(20):
        h = net.encoder(torch.from_numpy((X[row] - model.mean_) / model.scale_))
        for layer in range(2):
            seen = net.norms[layer](h)
            shares = torch.softmax(net.gates[layer].weight.double() @ seen, 0)
            best = int(shares.argmax())
            for expert, weight in ((net.experts[layer][best], shares[best]), (net.shared[layer], 1.0)):
                made = expert.down.weight @ (F.silu(expert.gate.weight @ seen) * (expert.up.weight @ seen))
                h = h + weight * made
        head = net.heads["abc".index(TASK[row])]
        wanted = head(net.norms[2](h)).detach().numpy() * model.target_scale_ + model.target_mean_
        assert np.allclose(said[row], wanted, atol=1e-5)


def test_the_gate_learns() -> None:
    made = [ScaleZero(epochs=epochs).fit(X, Y, groups=TASK).module_.gates[0].weight for epochs in (1, 6)]
    assert not torch.allclose(made[0], made[1], atol=1e-3)


def test_tasks_that_contradict_each_other_pull_apart() -> None:
    twice = np.concatenate([X, X])
    task = np.repeat(["plus", "minus"], len(X))
    y = np.concatenate([X[:, 0], -X[:, 0]])
    model = ScaleZero(epochs=1).fit(twice, y, groups=task)
    with torch.no_grad():
        model.module_.heads[1].load_state_dict(model.module_.heads[0].state_dict())
    cosines = model.gradient_cosines(twice, y, groups=task)
    assert np.allclose(np.diag(cosines), 1)
    assert cosines[0, 1] < -0.5
    same = model.gradient_cosines(twice, np.concatenate([y[: len(X)]] * 2), groups=task)
    assert same[0, 1] == pytest.approx(1, abs=1e-9)


def test_without_a_task_the_heads_are_averaged() -> None:
    model = ScaleZero(epochs=2).fit(X, Y, groups=TASK)
    each = [model.predict(X, groups=np.full(len(X), name)) for name in "abc"]
    assert np.allclose(model.predict(X), np.mean(each, axis=0))


def test_experts_and_heads_learn_what_one_head_cannot() -> None:
    told = ScaleZero(epochs=25).fit(X, Y, groups=TASK)
    untold = ScaleZero(epochs=25).fit(X, Y)
    assert np.square(told.predict(X, groups=TASK) - Y).mean() < 0.2 * np.square(untold.predict(X) - Y).mean()


def test_bad_groups_are_refused() -> None:
    model = ScaleZero(epochs=1).fit(X, Y, groups=TASK)
    with pytest.raises(UserError, match="no group named 'd'"):
        model.predict(X[:1], groups=["d"])
    with pytest.raises(UserError, match="one label a row, 240 in all, got"):
        ScaleZero(epochs=1).fit(X, Y, groups=TASK[:5])
    with pytest.raises(UserError, match="a label that is not finite"):
        ScaleZero(epochs=1).fit(X, Y, groups=np.full(240, np.nan))
    with pytest.raises(SettingError, match="num_layers of ScaleZero"):
        ScaleZero(num_layers=0).fit(X, Y)
