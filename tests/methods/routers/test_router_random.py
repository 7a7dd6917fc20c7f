"""What the router random promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.routers.random import Random
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=4, d_expert=8, num_experts=6)
COUNT = 6000


def by_position(seed: int, top_k: int = 2) -> Routing:
    return Random(SHAPE, top_k=top_k, seed=seed)(
        RouterInput.of(torch.zeros(COUNT, 4), positions=torch.arange(COUNT))
    )


def drawn(seed: int, x: torch.Tensor) -> Routing:
    return Random(SHAPE, top_k=2)(RouterInput.of(x, generator=torch.Generator().manual_seed(seed)))


def test_all_experts_are_equally_likely_drawn_or_by_position() -> None:
    for routing in (drawn(0, torch.zeros(COUNT, 4)), by_position(0), by_position(7)):
        # Two thousand expected; five standard deviations are 183.
        assert (routing.load - COUNT / 3).abs().max() < 183
        assert (routing.weights == 0.5).all()


def test_pairs_of_experts_and_of_neighbouring_positions_are_independent() -> None:
    routing = by_position(0, top_k=1)
    expert = torch.empty(COUNT, dtype=torch.long).scatter(0, routing.token_ids, routing.expert_ids)
    for step in (1, 2, 6):
        same = (expert[step:] == expert[:-step]).double().mean()
        assert abs(same - 1 / 6) < 0.025
    layers = by_position(0).expert_ids, by_position(1).expert_ids
    assert not torch.equal(*layers)


def test_the_draw_takes_no_notice_of_the_token() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(3, x).expert_ids, drawn(3, -x).expert_ids)
    assert torch.equal(drawn(3, x).token_ids, drawn(3, -x).token_ids)
    assert not torch.equal(drawn(3, x).token_ids, drawn(4, x).token_ids)
