"""Meta-DMoE: the step by hand, the expert that is left out, and adapting to a domain that is new."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.estimators._adapting import Aggregator, stepped
from mixtura.methods.estimators.meta_dmoe import MetaDmoe

GENERATOR = np.random.default_rng(5)
DOMAIN = GENERATOR.integers(0, 4, 200)
X = GENERATOR.normal(size=(200, 3))
Y = np.array(["no", "yes"])[(X[:, 0] > 0).astype(int)]
X[:, 1] += DOMAIN
KNOWN = DOMAIN < 3


@pytest.fixture(scope="module")
def model() -> MetaDmoe:
    return MetaDmoe(epochs=4, d_hidden=8).fit(X[KNOWN], Y[KNOWN], groups=DOMAIN[KNOWN])


def test_a_step_by_hand() -> None:
    module = torch.nn.Linear(2, 1).double()
    x, wanted = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    errors = (module(x) - wanted).detach()
    weight = module.weight - 0.3 * 2 * (errors * x).mean(0)
    bias = module.bias - 0.3 * 2 * errors.mean()
    assert torch.allclose(stepped(module, x, wanted, 0.3)(x), x @ weight.T + bias)


def test_the_step_is_learned_through() -> None:
    module = torch.nn.Linear(2, 1).double()
    wanted = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64)
    stepped(module, x, wanted, 0.5)(x).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0


def test_an_expert_that_is_left_out_is_not_heard() -> None:
    aggregator = Aggregator(8).double()
    tokens = torch.randn(5, 3, 8, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 1] = 100 * torch.randn(5, 8, dtype=torch.float64)
    left_out = torch.full((5,), 1)
    (first, shares), (second, _) = aggregator(tokens, left_out), aggregator(changed, left_out)
    assert torch.allclose(first, second)
    assert not shares[:, 1].any()
    assert torch.allclose(shares.sum(1), torch.ones(5, dtype=torch.float64))
    assert not torch.allclose(aggregator(tokens, None)[0], aggregator(changed, None)[0])


def test_prediction_adapts_each_group_by_its_own_rows(model: MetaDmoe) -> None:
    groups = np.array(["left", "right"])[(np.arange(200) % 2)]
    shares = model.predict_proba(X, groups=groups)
    net = model.module_
    for label in ("left", "right"):
        mine = groups == label
        x = model.standardised(X[mine])
        wanted = net.told(x[:64], None)[0]
        before = dict(net.student.named_parameters())
        loss = F.mse_loss(net.student(x[:64]), wanted)
        slopes = torch.autograd.grad(loss, tuple(before.values()))
        moved = {n: one - 0.1 * slope for (n, one), slope in zip(before.items(), slopes, strict=True)}
        said = net.head(torch.func.functional_call(net.student, moved, (x,))).softmax(1)
        assert np.allclose(shares[mine], said.detach().numpy())


def test_a_step_of_nothing_is_the_student(model: MetaDmoe) -> None:
    before = model.predict_proba(X)
    still = MetaDmoe(step=0.0, epochs=4, d_hidden=8).fit(X[KNOWN], Y[KNOWN], groups=DOMAIN[KNOWN])
    assert np.allclose(still.predict_proba(X), still.predict_proba(X, groups=DOMAIN))
    assert not np.allclose(before, model.predict_proba(X, groups=DOMAIN))


def test_experts_know_their_own_domain_alone(model: MetaDmoe) -> None:
    other = Y[KNOWN].copy()
    changed = DOMAIN[KNOWN] == 2
    other[changed] = other[changed][::-1]
    again = MetaDmoe(epochs=4, d_hidden=8).fit(X[KNOWN], other, groups=DOMAIN[KNOWN])
    for number in range(3):
        pair = [next(one.module_.experts[number].parameters()) for one in (model, again)]
        assert torch.equal(*pair) == (number != 2)


def test_a_new_domain_is_classified() -> None:
    learned = MetaDmoe(epochs=12).fit(X[KNOWN], Y[KNOWN], groups=DOMAIN[KNOWN])
    new = ~KNOWN
    assert (learned.predict(X[new], groups=DOMAIN[new]) == Y[new]).mean() > 0.8


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="support of MetaDmoe"):
        MetaDmoe(support=0).fit(X, Y)
