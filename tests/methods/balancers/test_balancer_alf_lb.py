"""What the theory of the balancer alf_lb states, shown on small assignments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mixtura.methods.balancers.alf_lb import AlfLb
from mixtura.types import BalancerInput, LayerShape, Routing

NUM_EXPERTS = 4
SHAPE = LayerShape(d_model=4, d_expert=4, num_experts=NUM_EXPERTS)


def _scores(num_tokens: int, seed: int = 0) -> Tensor:
    """Scores that favour expert 0."""
    noise = torch.randn(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    return (noise + torch.tensor([1.5, 0.5, 0.0, -0.5])).softmax(-1)


def _routed(scores: Tensor, bias: Tensor, top_k: int = 1) -> Routing:
    chosen = (scores + bias).topk(top_k).indices
    valid = torch.ones(len(scores), dtype=torch.bool)
    return Routing.from_choices(chosen, scores.gather(1, chosen), scores=scores, logits=scores, valid=valid)


def _lagrangian(scores: Tensor, bias: Tensor, top_k: int = 1) -> float:
    """The dual objective: what the best choices score with biases, less the price of even loads."""
    best = (scores + bias).double().topk(top_k).values.sum()
    return float(best - bias.double().sum() * len(scores) * top_k / NUM_EXPERTS)


def _run(scores: Tensor, num_steps: int, **settings: Any) -> list[tuple[Tensor, Routing]]:
    balancer = AlfLb(**settings)
    state = balancer.start(SHAPE)
    seen = []
    for step in range(num_steps):
        routing = _routed(scores, state["bias"])
        seen.append((state["bias"], routing))
        state = balancer.update(BalancerInput(routing=routing, state=state, step=step))
    return seen


def test_the_step_is_the_size_times_what_is_lacking() -> None:
    routing = _routed(torch.eye(4)[[0, 0, 0, 1]], torch.zeros(4))
    balancer = AlfLb(step_size=0.1, schedule="constant")
    bias = balancer.update(BalancerInput(routing=routing, state=balancer.start(SHAPE), step=7))["bias"]
    torch.testing.assert_close(bias, torch.tensor([-0.2, 0.0, 0.1, 0.1]))


@pytest.mark.parametrize(("schedule", "part"), [("constant", 1.0), ("inverse_sqrt", 0.5), ("inverse", 0.25)])
def test_schedules_at_the_fourth_step(
    schedule: Literal["constant", "inverse_sqrt", "inverse"], part: float
) -> None:
    routing = _routed(_scores(50), torch.zeros(4))
    start = AlfLb().start(SHAPE)
    made: list[Tensor] = []
    for step in (0, 3):
        balancer = AlfLb(schedule=schedule)
        made.append(balancer.update(BalancerInput(routing=routing, state=start, step=step))["bias"])
    torch.testing.assert_close(made[1], part * made[0])


def test_the_lagrangian_falls_at_every_step() -> None:
    scores = _scores(4000)
    seen = _run(scores, 60, step_size=0.02, schedule="constant")
    values = [_lagrangian(scores, bias) for bias, _ in seen]
    assert all(after < before for before, after in pairwise(values))
    # Against the gradient it rises: a wrong sign would be seen.
    wrong = _lagrangian(scores, -seen[-1][0])
    assert wrong > values[0] > values[-1]


def test_tokens_move_from_experts_to_less_loaded_ones() -> None:
    scores = _scores(1000)
    seen = _run(scores, 30, step_size=0.05, schedule="constant")
    num_moved = 0
    for (_, before), (_, after) in pairwise(seen):
        # Assignments are sorted by expert; one choice a token lines them up by token.
        old, new = (r.expert_ids[r.token_ids.argsort()] for r in (before, after))
        moved = old != new
        num_moved += int(moved.sum())
        assert (before.load[new[moved]] < before.load[old[moved]]).all()
    assert num_moved > 100


def test_loads_end_near_balance() -> None:
    scores = _scores(1000)
    seen = _run(scores, 400, step_size=0.05, schedule="inverse_sqrt")
    first, last = seen[0][1].load, seen[-1][1].load
    assert first.max() > 500
    assert (last - 250).abs().max() <= NUM_EXPERTS - 1


@pytest.mark.parametrize(("schedule", "logarithmic"), [("inverse", True), ("constant", False)])
def test_regret_grows_like_a_logarithm_under_the_inverse_schedule(
    schedule: Literal["inverse", "constant"], logarithmic: bool
) -> None:
    everything = _scores(3000, seed=1)
    best = _lagrangian(everything, _run(everything, 300, step_size=0.1)[-1][0])
    balancer = AlfLb(step_size=1.0 if logarithmic else 0.1, schedule=schedule)
    state = balancer.start(SHAPE)
    regret, at = 0.0, {}
    generator = torch.Generator().manual_seed(2)
    for step in range(800):
        bias = state["bias"]
        # What the bias costs on all tokens, the expectation of what it costs on a batch.
        regret += (_lagrangian(everything, bias) - best) / len(everything)
        at[step + 1] = regret
        batch = _routed(everything[torch.randint(3000, (64,), generator=generator)], bias)
        state = balancer.update(BalancerInput(routing=batch, state=state, step=step))
    growth = (at[800] - at[200]) / (at[200] - at[50])
    # Four times the steps add the same to a logarithm, and four times as much to a constant regret.
    assert (growth < 1.4) if logarithmic else (growth > 3)
