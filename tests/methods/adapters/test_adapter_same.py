"""What the adapter same promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.adapters.adapter_inputs import PROMPT, SEQUENCES, X, added, best, given, softmax, stirred

from mixtura.methods.adapters._curvature import evened, held_back, principal
from mixtura.types import Progress


def test_a_sequence_gets_the_experts_of_its_prompts_mean_softmax() -> None:
    made = stirred("same", rank=3, alpha=6.0)
    valid = given().valid
    scores = [softmax([v / 4 for v in (made.gate @ x).tolist()]) for x in X]
    wanted = torch.zeros(7, 20, dtype=torch.float64)
    for token, x in enumerate(X):
        own = [t for t in range(7) if SEQUENCES[t] == SEQUENCES[token] and valid[t] and PROMPT[t]]
        shares = best([sum(scores[t][e] for t in own) / len(own) for e in range(4)], 2)
        wanted[token] = sum(s * 2 * (b @ (a @ x)) for s, a, b in zip(shares, made.a, made.b, strict=True))
    torch.testing.assert_close(added(made.change(given())), wanted.detach(), rtol=1e-8, atol=1e-10)


def test_gradients_are_changed_along_directions_alone() -> None:
    moment = torch.diag(torch.tensor([8.0, 1.9, 0.1, 0.0], dtype=torch.float64))
    axes, sizes = principal(moment, 3, 0.9)
    assert sizes.tolist() == pytest.approx([8.0, 1.9, 0.0])
    grad = torch.randn(2, 4, dtype=torch.float64)
    factors = torch.tensor([0.8, 1.2, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(evened(grad, axes, sizes), grad * factors)
    inverse = torch.tensor([1 / 8.9, 1 / 2.8, 1 / 0.9, 1 / 0.9], dtype=torch.float64)
    torch.testing.assert_close(held_back(grad, axes, sizes, 0.9), grad * inverse)
    torch.testing.assert_close(held_back(grad, axes * 0, sizes * 0, 0.9), grad / 0.9)


def with_gradients(made: Any, value: float = 1.0) -> None:
    """Give every parameter a gradient."""
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_a_task_that_is_over_holds_the_next_one_back_and_freezes_experts() -> None:
    made = stirred("same", rank=3, warmup=0)
    moment = X.float().T @ X.float()
    seen = Progress(step=0, num_steps=1, loads=torch.tensor([7.0, 7, 0, 0]), moment=moment, num_tokens=7)
    with_gradients(made)
    made.before_step(seen)
    # In the first task nothing is held back or frozen.
    assert all(torch.equal(a.grad, torch.ones_like(a)) for a in made.a)
    assert int(made.task) == 1
    assert not made.seen.moment.any()
    assert made.seen.past_sizes.sum() > 0
    for expert in range(4):
        made.a[expert].data.fill_(float(expert))
    with_gradients(made)
    made.before_step(
        Progress(step=0, num_steps=9, loads=torch.tensor([0.0, 1, 7, 0]), moment=moment, num_tokens=7)
    )
    # Expert 3 matters most and is not used; expert 1 is the task's own.
    assert made.a[3].grad is None
    assert made.b[3].grad is None
    wanted = held_back(torch.ones_like(made.a[1]), made.seen.past_axes, made.seen.past_sizes, 0.9)
    torch.testing.assert_close(made.a[1].grad, wanted)
