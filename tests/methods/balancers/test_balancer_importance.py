"""What the balancer importance promises beyond its kind's contract."""

from __future__ import annotations

import statistics

import pytest
import torch

from mixtura.authoring.contracts import sample_routing
from mixtura.methods.balancers.importance import Importance
from mixtura.types import BalancerInput, Routing


def test_is_variance_over_squared_mean_of_summed_weights() -> None:
    routing = sample_routing(seed=2, hot=1.0)
    sums = [0.0] * 8
    for expert, weight in zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True):
        sums[expert] += weight
    by_hand = statistics.pvariance(sums) / statistics.mean(sums) ** 2
    made = Importance(coefficient=0.1).loss(BalancerInput(routing=routing)).item()
    assert made == pytest.approx(0.1 * by_hand, rel=1e-5)


def test_scores_of_experts_that_were_not_chosen_count_where_asked() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    chosen, valid = torch.tensor([[0], [0]]), torch.tensor([True, True])
    routing = Routing.from_choices(chosen, scores[:, :1], scores=scores, logits=scores, valid=valid)
    values = [Importance(coefficient=1.0, of=of) for of in ("weights", "scores")]
    by_hand = [2.0, statistics.pvariance([0.6, 0.3, 0.1]) / (1 / 3) ** 2]
    assert [b.loss(BalancerInput(routing=routing)).item() for b in values] == pytest.approx(by_hand)


def test_few_tokens_of_large_weight_are_as_important_as_many_of_small() -> None:
    chosen = torch.tensor([[0], [1], [1], [1], [1]])
    weights = torch.tensor([[1.0], [0.25], [0.25], [0.25], [0.25]])
    scores, valid = torch.zeros(5, 2), torch.ones(5, dtype=torch.bool)
    routing = Routing.from_choices(chosen, weights, scores=scores, logits=scores, valid=valid)
    assert Importance(coefficient=1.0).loss(BalancerInput(routing=routing)).item() == pytest.approx(0.0)
