"""What the balancer moec promises beyond its kind's contract."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

import mixtura
from mixtura.authoring.contracts import sample_routing
from mixtura.errors import UserError
from mixtura.methods.balancers.moec import Moec
from mixtura.types import BalancerInput, LayerShape, RouterInput


def test_is_the_variance_within_clusters_by_hand() -> None:
    routing = sample_routing(seed=1)
    total = 0.0
    rows = routing.scores[routing.valid].tolist()
    for row in rows:
        total += sum(statistics.pvariance(row[first : first + 4]) for first in (0, 4))
    made = Moec(coefficient=2.0, num_clusters=2).loss(BalancerInput(routing=routing)).item()
    assert made == pytest.approx(2 * total / len(rows), rel=1e-5)


def test_scores_that_are_alike_within_clusters_cost_nothing_however_clusters_differ() -> None:
    routing = sample_routing(seed=2)
    scores = torch.tensor([0.2, 0.2, 0.05, 0.05]).repeat_interleave(2).expand(64, 8)
    alike = BalancerInput(routing=replace(routing, scores=scores))
    assert Moec(num_clusters=4).loss(alike).item() == pytest.approx(0.0, abs=1e-12)
    assert Moec(num_clusters=1).loss(alike).item() > 1e-3


def test_dropout_takes_as_many_from_every_cluster_and_others_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    balancer = Moec(num_clusters=4, dropout=0.5)
    inputs = BalancerInput(routing=sample_routing(num_experts=16), generator=generator)
    drawn = torch.stack([balancer.update(inputs)["allowed"] for _ in range(200)])
    assert (drawn.view(200, 4, 4).sum(-1) == 2).all()
    share = drawn.float().mean(0)
    assert ((share > 0.35) & (share < 0.65)).all()


def test_a_dropped_experts_tokens_go_to_others() -> None:
    router = mixtura.create("routers", "top_k", LayerShape(16, 8, 8), top_k=2)
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(3))
    balancer = Moec(num_clusters=2, dropout=0.5)
    inputs = BalancerInput(routing=router(RouterInput.of(x)), generator=torch.Generator().manual_seed(4))
    allowed = balancer.update(inputs)["allowed"]
    routing = router(RouterInput.of(x, allowed=allowed.expand(100, 8)))
    assert (routing.load[~allowed] == 0).all()
    assert routing.load.sum() == 200


def test_without_randomness_nothing_is_dropped() -> None:
    assert Moec(dropout=0.5).update(BalancerInput(routing=sample_routing()))["allowed"].all()


def test_experts_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match="8 experts cannot be divided into 3 clusters"):
        Moec(num_clusters=3).start(LayerShape(16, 8, 8))
    with pytest.raises(UserError, match="8 experts cannot be divided into 3 clusters"):
        Moec(num_clusters=3).loss(BalancerInput(routing=sample_routing()))
