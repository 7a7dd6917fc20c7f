"""Families of systems: the textbook's steps, families told apart, a new environment's context alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._systems import solved
from mixtura.methods.estimators.system_family import SystemFamily

GENERATOR = np.random.default_rng(1)
PLACE = np.arange(360) % 6
TURN = np.where(PLACE < 3, 0.4, -0.4) * (1 + 0.1 * (PLACE % 3))


def moved(X: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """States on circles a step later."""
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([c * X[:, 0] - s * X[:, 1], s * X[:, 0] + c * X[:, 1]], axis=1)


X = GENERATOR.normal(size=(360, 2))
Y = moved(X, TURN)


@pytest.fixture(scope="module")
def model() -> SystemFamily:
    return SystemFamily(num_experts=2, d_hidden=16, epochs=25).fit(X, Y, groups=PLACE)


def test_a_step_is_the_textbooks() -> None:
    # Of x' = x the rule gives the first terms of the exponential.
    x = torch.ones(1, 1, dtype=torch.float64)
    found = float(solved(lambda both: both[:, :1], x, torch.zeros(1, 1, dtype=torch.float64)))
    assert found == pytest.approx(sum(1 / math.factorial(n) for n in range(5)))


def test_the_network_by_a_loop(model: SystemFamily) -> None:
    net, said = model.module_, model.predict(X[:12], groups=PLACE[:12])
    for row in range(12):
        context = net.contexts[PLACE[row]].detach()
        scores = net.gate.weight.double() @ context + net.gate.bias.double()
        expert = net.experts[int(scores.argmax())]
        state = torch.from_numpy((X[row] - model.mean_) / model.scale_)

        def slope(
            at: torch.Tensor, expert: torch.nn.Module = expert, c: torch.Tensor = context
        ) -> torch.Tensor:
            found: torch.Tensor = expert(torch.cat([at, c]))
            return found

        one = slope(state)
        two = slope(state + one / 2)
        three = slope(state + two / 2)
        after = state + (one + 2 * two + 2 * three + slope(state + three)) / 6
        assert np.allclose(said[row], after.detach().numpy() * model.scale_ + model.mean_, atol=1e-6)


def test_steps_are_learned_and_each_environment_has_one_expert(model: SystemFamily) -> None:
    assert model.score(X, Y, groups=PLACE) > 0.9
    routing = model.route(X, groups=PLACE)
    experts = np.empty(360, dtype=int)
    experts[routing.token_ids.numpy()] = routing.expert_ids.numpy()
    assert all(len({*experts[place == PLACE].tolist()}) == 1 for place in range(6))
    assert (routing.weights == 1).all()


def test_contexts_and_experts_learn_in_turns(model: SystemFamily) -> None:
    x = model._given(X[:30], PLACE[:30])
    for of_contexts in (True, False):
        net = model.module_
        net.zero_grad(set_to_none=True)
        net.in_turns(x, torch.from_numpy(Y[:30]), of_contexts).backward()
        assert (net.contexts.grad is not None) == of_contexts
        assert all((one.grad is None) for one in net.experts.parameters()) == of_contexts
        net.zero_grad(set_to_none=True)


def test_a_new_environment_learns_its_context_alone(model: SystemFamily) -> None:
    import copy

    turn = np.full(40, -0.43)
    new = GENERATOR.normal(size=(40, 2))
    adapted = copy.deepcopy(model).adapt(new, moved(new, turn), 2.5)
    assert adapted.groups_.tolist() == [0, 1, 2, 2.5, 3, 4, 5]
    assert torch.equal(adapted.module_.contexts[[0, 1, 2, 4, 5, 6]], model.module_.contexts)
    for name, one in model.module_.experts.state_dict().items():
        assert torch.equal(one, adapted.module_.experts.state_dict()[name])
    assert np.array_equal(adapted.predict(X, groups=PLACE), model.predict(X, groups=PLACE))
    more = GENERATOR.normal(size=(40, 2))
    told = adapted.score(more, moved(more, turn), groups=np.full(40, 2.5))
    assert told > adapted.score(more, moved(more, turn))
    with pytest.raises(UserError, match=r"an environment 2\.5 already"):
        adapted.adapt(new, new, 2.5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="targets of SystemFamily are states"):
        SystemFamily().fit(X, Y[:, :1], groups=PLACE)
    with pytest.raises(SettingError, match="d_context of SystemFamily"):
        SystemFamily(d_context=0).fit(X, Y)
