"""What the router gw_moe promises beyond its kind's contract."""

from __future__ import annotations

import math

import torch

from mixtura.methods.routers.gw_moe import GwMoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def per_token(routing: Routing) -> list[int]:
    return torch.bincount(routing.token_ids, minlength=routing.num_tokens).tolist()


def test_uncertain_tokens_get_the_probability_weighted_sum_of_all_experts() -> None:
    router, experts = GwMoe(SHAPE, top_k=1, threshold=0.8), Experts(SHAPE)
    layer = MoELayer(router, experts)
    x = tokens()
    output, routing = layer(RouterInput.of(x, training=True))
    scores = (x @ router.weight.T).softmax(-1)
    unsure = [-sum(p * math.log(p) for p in row) >= 0.8 * math.log(4) for row in scores.tolist()]
    assert per_token(routing) == [4 if flag else 1 for flag in unsure]
    assert 5 < sum(unsure) < 35, "both kinds of tokens are needed"
    everyone = torch.arange(4).repeat(40)
    each = experts.matrices.run(x, torch.arange(40).repeat_interleave(4), everyone).view(40, 4, 16)
    for token in range(40):
        weights = scores[token] if unsure[token] else torch.eye(4)[scores[token].argmax()]
        torch.testing.assert_close(output[token], (weights[:, None] * each[token]).sum(0))


def test_inference_is_plain_top_k() -> None:
    routing = GwMoe(SHAPE, top_k=2, threshold=0.0)(RouterInput.of(tokens()))
    assert per_token(routing) == [2] * 40


def test_the_first_uncertain_tokens_of_each_sequence_take_the_slots() -> None:
    router = GwMoe(SHAPE, top_k=1, threshold=0.0, max_slots=2)
    ids = torch.tensor([0, 1, 0, 0, 1, 1, 1, 0])
    valid = torch.ones(8, dtype=torch.bool)
    valid[0] = False
    routing = router(RouterInput(x=tokens(8), valid=valid, training=True, sequence_ids=ids))
    assert per_token(routing) == [0, 4, 4, 4, 4, 1, 1, 1]


def test_without_renormalising_the_chosen_weigh_their_probability() -> None:
    router = GwMoe(SHAPE, top_k=2, renormalize=False, max_slots=0)
    routing = router(RouterInput.of(tokens(), training=True))
    torch.testing.assert_close(routing.weights, routing.scores[routing.token_ids, routing.expert_ids])
