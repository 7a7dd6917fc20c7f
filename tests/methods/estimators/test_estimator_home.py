"""The hierarchy of experts: what a task may see, labels with holes, the feature gate, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._tasks import GatedExpert, Hierarchy, masked_bce
from mixtura.methods.estimators.home import Home


def lessons(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(seed).normal(size=(120, 5))
    y = np.stack([X[:, 0] > 0, X[:, 0] + X[:, 1] > 1, X[:, 2] > 0], axis=1).astype(float)
    y[40:, 1] = np.nan
    return X, y


def test_other_groups_learn_nothing_from_a_task() -> None:
    net = Hierarchy(4, [[0, 1], [2]], per_set=2, width=6, rank=2)
    net(torch.randn(10, 4)).output[:, 2].sum().backward()
    moved = [any(w.grad is not None and w.grad.any() for w in e.parameters()) for e in net.experts]
    sets = ["all", "group 0", "group 1", "task 0", "task 1", "task 2"]
    learned = [name for name, found in zip(sets, moved[::2], strict=True) if found]
    assert learned == ["all", "group 1", "task 2"]
    meta = [any(w.grad is not None and w.grad.any() for w in e.parameters()) for e in net.meta]
    assert meta == [True, True, False, False, True, True]


def test_a_feature_gate_of_zeros_scales_nothing() -> None:
    expert = GatedExpert(4, 6, 2).eval()
    x = torch.randn(7, 4)
    with torch.no_grad():
        expert.a.weight.zero_()
        assert torch.allclose(expert(x), expert.inner(x))
        expert.a.weight.fill_(0.5)
        hidden = expert.b.weight @ (expert.a.weight @ x[0])
        assert torch.allclose(expert(x)[0], expert.inner((x[0] * 2 * hidden.sigmoid())[None])[0])


def test_labels_that_are_missing_count_nothing() -> None:
    logits = torch.randn(4, 2, dtype=torch.float64)
    labels = torch.tensor([[1, 0], [math.nan, 1], [0, math.nan], [math.nan, math.nan]]).double()
    expected = 0.0
    for task in range(2):
        terms = [
            math.log(1 + math.exp(-z if label else z))
            for z, label in zip(logits[:, task].tolist(), labels[:, task].tolist(), strict=True)
            if not math.isnan(label)
        ]
        expected += sum(terms) / len(terms)
    assert float(masked_bce(logits, labels)) == pytest.approx(expected)
    assert float(masked_bce(logits, torch.full_like(labels, math.nan))) == 0


@pytest.mark.parametrize("per_set", [1, 2])
def test_a_task_by_loops(per_set: int) -> None:
    X, y = lessons()
    model = Home(task_groups=[[0, 1], [2]], per_set=per_set, epochs=2).fit(X, y)
    net, x = model.module_, model.standardised(X)[:3]
    meta = [expert(x) for expert in net.meta]
    seen = {0: [0], 1: [0, 1], 2: [0, 2]}
    features = []
    for place in range(3):
        ids = [s * per_set + n for s in seen[place] for n in range(per_set)]
        shares = net.meta_gates[place](x)[:, ids].softmax(-1)
        features.append(sum(shares[:, n, None] * meta[one] for n, one in enumerate(ids)))
    inputs = [features[0], features[1], features[2], features[1], features[1], features[2]]
    z, own = features[1], 4  # task 1 is in group 0, and its experts are the fifth set
    ids = [s * per_set + n for s in (0, 1, own) for n in range(per_set)]
    made = {one: net.experts[one](inputs[one // per_set]) for one in ids}
    shares = net.gates[1](z)[:, ids].softmax(-1)
    raw = net.self_gates[1](z)
    again = raw.sigmoid() if per_set == 1 else raw.softmax(-1)
    read = sum(shares[:, n, None] * made[one] for n, one in enumerate(ids))
    read = read + sum(again[:, n, None] * made[own * per_set + n] for n in range(per_set))
    assert torch.allclose(model.output(X)[:3, 1], net.towers[1](read)[:, 0], atol=1e-6)


def test_routing_has_a_token_a_row_and_task_and_hides_other_groups() -> None:
    X, y = lessons()
    model = Home(task_groups=[[0, 1], [2]], epochs=1).fit(X, y)
    routing = model.route(X[:4])
    assert routing.num_tokens == 12
    tasks = routing.token_ids % 3
    assert sorted(set(routing.expert_ids[tasks == 2].tolist())) == [0, 1, 4, 5, 10, 11]


@pytest.mark.parametrize(
    ("groups", "change", "error", "why"),
    [
        ([[0, 1]], None, SettingError, "each of the 3 tasks once"),
        ([[0, 1], [1, 2]], None, SettingError, "each of the 3 tasks once"),
        (None, 2.0, UserError, "labels of Home are 0, 1, or NaN"),
        (None, "one", UserError, "task 1 of Home has labels of one class alone"),
    ],
)
def test_bad_tasks_are_refused(groups: object, change: object, error: type[Exception], why: str) -> None:
    X, y = lessons()
    if change == "one":
        y[:, 1] = 0
    elif change is not None:
        y[0, 0] = change
    with pytest.raises(error, match=why):
        Home(task_groups=groups, epochs=1).fit(X, y)
