"""What the balancer conflict_loss promises beyond its kind's contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixtura.authoring.contracts import sample_routing
from mixtura.methods.balancers.conflict_loss import ConflictLoss
from mixtura.types import BalancerInput, LayerShape, Routing

SHAPE = LayerShape(d_model=4, d_expert=4, num_experts=3)


def _routing(experts: list[int]) -> Routing:
    chosen = torch.tensor(experts)[:, None]
    logits = torch.zeros(len(experts), 3, requires_grad=True)
    scores = logits.softmax(-1)
    valid = torch.ones(len(experts), dtype=torch.bool)
    return Routing.from_choices(chosen, scores.gather(1, chosen), scores=scores, logits=logits, valid=valid)


def _inputs(gradients: Tensor, experts: tuple[int, ...] = (0, 1, 2)) -> BalancerInput:
    state = ConflictLoss().start(SHAPE)
    return BalancerInput(routing=_routing(list(experts)), state=state, gradients=gradients)


def test_equals_the_authors_sum_over_pairs_in_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 12, generator=generator)
    gradients[torch.rand(3, 12, generator=generator) < 0.3] = 0.0
    alpha = torch.randn(3, 3, generator=generator)
    alpha[0, 1] = 5e-4  # too weak a tie to count
    total = 0.0
    for i in range(3):
        for j in range(3):
            tie = float(alpha[i, j])
            if i == j or tie < 1e-3:
                continue
            both = [
                (float(a), float(b)) for a, b in zip(gradients[i], gradients[j], strict=True) if a * b != 0
            ]
            norms = math.sqrt(sum(a * a for a, _ in both) * sum(b * b for _, b in both))
            total += tie * max(-sum(a * b for a, b in both) / norms, 0.0)
    made = ConflictLoss(coefficient=2.0).loss(replace(_inputs(gradients), state={"alpha": alpha}))
    assert made.item() == pytest.approx(2 * total, rel=1e-5)


def test_descent_prunes_the_ties_of_conflicting_experts_alone() -> None:
    gradients = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]])
    inputs = _inputs(gradients)
    alpha = inputs.state["alpha"]
    (slope,) = torch.autograd.grad(ConflictLoss().loss(inputs), alpha)
    conflicting = torch.zeros(3, 3, dtype=torch.bool)
    conflicting[0, 1] = conflicting[1, 0] = conflicting[1, 2] = conflicting[2, 1] = True
    assert (slope[conflicting] > 0).all()
    assert (slope[~conflicting] == 0).all()


def test_experts_without_tokens_and_the_first_step_cost_nothing() -> None:
    gradients = torch.tensor([[1.0], [-1.0], [1.0]])
    assert ConflictLoss().loss(_inputs(gradients, experts=(0, 2))).item() == 0
    assert ConflictLoss().loss(_inputs(gradients, experts=(0, 1))).item() > 0
    assert ConflictLoss().loss(replace(_inputs(gradients), gradients=None)).item() == 0


def test_agreeing_or_unrelated_experts_cost_nothing() -> None:
    gradients = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]])
    assert ConflictLoss().loss(_inputs(gradients)).item() == 0


def test_ties_by_scores_teach_the_router_not_to_mix_conflicting_experts() -> None:
    balancer = ConflictLoss(coefficient=1.0, ties="scores")
    routing = sample_routing(seed=1, num_experts=3)
    gradients = torch.tensor([[1.0], [-1.0], [1.0]])
    inputs = BalancerInput(routing=routing, gradients=gradients)
    loss = balancer.loss(inputs)
    rows = routing.scores[routing.valid].detach()
    by_hand = 2 * float((rows[:, 1] * (rows[:, 0] + rows[:, 2])).mean())
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    (slope,) = torch.autograd.grad(loss, routing.logits)
    sure = routing.scores[:, 0] > 0.6
    # Where expert 0 is preferred, descent lowers its rival and not its ally.
    assert (slope[sure & routing.valid][:, 1] > 0).all()


def test_the_default_weighs_ties_as_they_are_by_ten_as_the_authors_run_does() -> None:
    gradients = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    assert ConflictLoss().loss(_inputs(gradients)).item() == pytest.approx(10 * 2 * 0.1)


def test_ties_are_in_the_graph_before_there_are_gradients() -> None:
    inputs = replace(_inputs(torch.ones(3, 2)), gradients=None)
    loss = ConflictLoss().loss(inputs)
    (slope,) = torch.autograd.grad(loss, inputs.state["alpha"])
    assert loss.item() == 0
    assert torch.equal(slope, torch.zeros(3, 3))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e25])
def test_the_size_of_gradients_does_not_matter(size: float) -> None:
    gradients = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    expected = ConflictLoss().loss(_inputs(gradients))
    torch.testing.assert_close(ConflictLoss().loss(_inputs(size * gradients)), expected)


def test_a_gradient_that_overflowed_counts_as_none() -> None:
    gradients = torch.tensor([[1.0, float("inf")], [-1.0, -1.0], [1.0, 1.0]])
    without = torch.where(gradients.isfinite().all(-1, keepdim=True), gradients, 0.0)
    torch.testing.assert_close(ConflictLoss().loss(_inputs(gradients)), ConflictLoss().loss(_inputs(without)))
