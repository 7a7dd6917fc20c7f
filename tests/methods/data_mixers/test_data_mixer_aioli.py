"""Aioli beside plain loops: a planted matrix is found, shares follow from it by the paper's rule."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.data_mixers import Domains, Standing, Stretch
from mixtura.methods.data_mixers.aioli import Aioli

PLANTED = torch.tensor([[4.0, 1.0, 0.5], [0.25, 3.0, 1.0], [2.0, 0.5, 5.0]], dtype=torch.float64) / 1000
DOMAINS = Domains(("a", "b", "c"), torch.ones(3, dtype=torch.float64), 120, 40)


def run(mixer: Aioli, planted: list[Tensor]) -> tuple[list[Stretch], list[Tensor]]:
    """A round for each matrix of how losses fall: all stretches, and what the state says A is after each."""
    state, losses, step = mixer.start(DOMAINS), torch.full((3,), 5.0, dtype=torch.float64), 0
    made, matrices = [], []
    for matrix in planted:
        for _ in range(3 * mixer.sweeps + 1):
            state, one = mixer.next(DOMAINS, state, Standing(step, losses))
            losses = losses - matrix @ one.weights * one.num_steps
            step += one.num_steps
            made.append(one)
        matrices.append(state["matrix"])
    return made, matrices


def expected(planted: list[Tensor], eta: float, memory: float, *, restart: bool) -> list[list[float]]:
    """The rule in plain loops, from the matrices that the sweeps would find."""
    weights, kept = [1 / 3] * 3, [[0.0] * 3 for _ in range(3)]
    made = []
    for number, matrix in enumerate(planted):
        found = matrix.tolist()
        least = min(0.0, *(value for row in found for value in row))
        total = sum(value - least for row in found for value in row)
        share = memory if number else 0.0
        for i in range(3):
            for j in range(3):
                kept[i][j] = (1 - share) * (found[i][j] - least) / total + share * kept[i][j]
        start = [1 / 3] * 3 if restart else weights
        raised = [start[j] * math.exp(eta * sum(kept[i][j] for i in range(3))) for j in range(3)]
        weights = [value / sum(raised) for value in raised]
        made.append(weights)
    return made


@pytest.mark.parametrize("restart", [False, True])
def test_shares_follow_the_rule(restart: bool) -> None:
    hurting = PLANTED.clone()
    hurting[1, 0] = -0.003
    planted = [PLANTED, hurting, PLANTED.T]
    mixer = Aioli(eta=0.7, memory=0.3, restart=restart)
    made, _ = run(mixer, planted)
    wanted = expected(planted, 0.7, 0.3, restart=restart)
    for place, weights in enumerate(wanted):
        assert made[7 * place + 6].weights.tolist() == pytest.approx(weights, rel=1e-9)


def test_a_planted_matrix_is_found() -> None:
    _, (found,) = run(Aioli(sweeps=3, probe_steps=2, focus=0.6), [PLANTED])
    torch.testing.assert_close(found, PLANTED / PLANTED.sum(), rtol=1e-9, atol=0)


def test_each_sweep_has_every_domain_once() -> None:
    made, _ = run(Aioli(focus=0.5), [PLANTED, PLANTED])
    assert [one.num_steps for one in made] == 2 * [4, 4, 4, 4, 4, 4, 16]
    orders = [int(one.weights.argmax()) for one in made]
    for start in (0, 3, 7, 10):
        assert Counter(orders[start : start + 3]) == Counter(range(3))
        assert sorted(made[start].weights.tolist()) == [0.25, 0.25, 0.5]
    others, _ = run(Aioli(focus=0.5, seed=1), [PLANTED, PLANTED])
    assert orders != [int(one.weights.argmax()) for one in others]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sweeps": 4}, "the sweeps of Aioli take 48 steps, but a round has 40"),
        ({"focus": 0.3}, "focus of Aioli must be more than an equal share of 3 domains, got 0.3"),
    ],
)
def test_what_measures_nothing_is_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Aioli(**settings).check(DOMAINS)  # type: ignore[arg-type]
