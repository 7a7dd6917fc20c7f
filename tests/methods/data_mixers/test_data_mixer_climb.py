"""CLIMB on trainings whose best mixture is known: trials are balanced, and the optimum is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.data_mixers import Domains, Standing, Stretch
from mixtura.methods.data_mixers._trials import candidates
from mixtura.methods.data_mixers.climb import Climb

NAMES = ("c", "a", "b")
DOMAINS = Domains(NAMES, torch.ones(3, dtype=torch.float64), 1000, 100)


def run(mixer: Climb, fall: object, domains: Domains = DOMAINS) -> tuple[list[Stretch], dict[str, Tensor]]:
    """A training whose loss falls by ``fall(weights)`` a step, less and less."""
    state, step, loss = mixer.start(domains), 0, 5.0
    made = []
    while step < domains.num_steps:
        standing = Standing(step, torch.full((3,), loss, dtype=torch.float64))
        state, one = mixer.next(domains, state, standing)
        loss -= one.num_steps * fall(one.weights) * loss / 5  # type: ignore[operator]
        step += one.num_steps
        made.append(one)
    return made, dict(state)


def test_a_quadratic_optimum_is_found() -> None:
    best = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    made, _ = run(Climb(draws=8, penalty=1e-9), lambda w: 1e-3 * (2 - (w - best).square().sum()))
    assert torch.allclose(made[-1].weights, best, atol=0.06)
    # Far nearer than what was tried at first.
    first = torch.stack([one.weights for one in made[:24]])
    assert (made[-1].weights - best).norm() < (first - best).norm(dim=1).median() / 3


def test_the_prediction_is_the_ridge_solution_by_hand() -> None:
    generator = torch.Generator().manual_seed(4)
    tilt = torch.rand(3, generator=generator, dtype=torch.float64) / 500
    mixer = Climb(rounds=1, draws=4, penalty=0.01)
    made, state = run(mixer, lambda w: float(w @ tilt))
    order = [1, 2, 0]
    tried = state["tried"].numpy()[:, order]
    before, falls = state["before"].numpy(), state["falls"].numpy()
    rows = np.column_stack([tried, tried**2, before - before.mean()])
    rows = rows - rows.mean(0)
    theta = np.linalg.inv(rows.T @ rows + 0.01 * np.eye(7)) @ rows.T @ (falls - falls.mean())
    pool = candidates(torch.tensor(order), 0).numpy()[:, order]
    predicted = np.column_stack([pool, pool**2]) @ theta[:6]
    assert np.allclose(made[-1].weights.numpy()[order], pool[predicted.argmax()])


def test_trials_are_halved_and_those_of_the_first_round_read_all_alike() -> None:
    made, _ = run(Climb(draws=4, rounds=3, probe_steps=2), lambda w: 1e-3 * float(w[0]))
    trials = [one for one in made if one.num_steps == 2]
    assert len(trials) == 3 * (4 + 2 + 1)
    assert torch.stack([one.weights for one in trials[:12]]).mean(0).tolist() == pytest.approx([1 / 3] * 3)
    later = torch.stack([one.weights for one in trials[12:]]).mean(0)
    assert later[0] > 0.6


def test_a_target_decides_what_is_lowered() -> None:
    for place, name in enumerate(NAMES):
        mixer = Climb(target=name)
        state, step, losses = mixer.start(DOMAINS), 0, torch.full((3,), 5.0, dtype=torch.float64)
        while step < DOMAINS.num_steps:
            state, one = mixer.next(DOMAINS, state, Standing(step, losses))
            # Every domain helps itself alone.
            losses = losses - 1e-3 * one.num_steps * one.weights
            step += one.num_steps
        assert int(one.weights.argmax()) == place


def test_the_seed_decides_what_is_tried() -> None:
    firsts = [run(Climb(seed=seed), lambda w: 0.0)[0][0].weights for seed in (0, 0, 1)]
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


@pytest.mark.parametrize(
    ("mixer", "says"),
    [
        (Climb(target="d"), "Climb needs a domain named 'd', but the domains are c, a, b"),
        (Climb(draws=200), "the trials of Climb take 4200 steps, but the training has 1000"),
    ],
)
def test_what_cannot_be_mixed_is_refused(mixer: Climb, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        mixer.check(DOMAINS)
