"""What the router sigma_moe promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.routers.sigma_moe import SigmaMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=12)


def tokens() -> torch.Tensor:
    return torch.randn(20, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_schedule_by_layers_and_steps() -> None:
    router = SigmaMoe(SHAPE, top_k=1, start_k=8, num_lower=8, switch_step=90)
    assert [router.num_active(layer, 89) for layer in range(10)] == [8, 8, 6, 6, 4, 4, 2, 2, 1, 1]
    assert {router.num_active(layer, 90) for layer in range(10)} == {1}
    other = SigmaMoe(SHAPE, top_k=3, start_k=6, num_lower=4, switch_step=90)
    assert [other.num_active(layer, 0) for layer in range(6)] == [6, 6, 3, 3, 3, 3]


def test_a_layer_routes_to_as_many_experts_as_the_schedule_says() -> None:
    router = SigmaMoe(SHAPE, top_k=1, start_k=8, num_lower=8, switch_step=90)
    scores = (tokens() @ router.weight.T).softmax(-1)
    for layer, step, count in ((0, 0, 8), (4, 0, 4), (7, 89, 2), (8, 0, 1), (0, 90, 1)):
        routing = router(RouterInput.of(tokens(), layer=layer, step=step))
        for token in range(20):
            mine = routing.token_ids == token
            best = scores[token].topk(count)
            assert set(routing.expert_ids[mine].tolist()) == set(best.indices.tolist())
        torch.testing.assert_close(routing.weights, scores[routing.token_ids, routing.expert_ids])


def test_more_experts_make_the_load_of_a_skewed_layer_more_even() -> None:
    router = SigmaMoe(SHAPE, top_k=1, start_k=12, switch_step=1)
    with torch.no_grad():
        router.weight[0] = 50 * tokens().mean(0)
    early, late = (router(RouterInput.of(tokens(), step=step)).load.float() for step in (0, 1))
    assert (early.max() / early.mean()).item() == 1
    assert (late.max() / late.mean()).item() > 4


def test_renormalised_weights_sum_to_one() -> None:
    routing = SigmaMoe(SHAPE, renormalize=True)(RouterInput.of(tokens()))
    sums = torch.zeros(20).index_add(0, routing.token_ids, routing.weights.detach())
    torch.testing.assert_close(sums, torch.ones(20))


def test_no_more_experts_than_there_are() -> None:
    router = SigmaMoe(LayerShape(d_model=4, d_expert=8, num_experts=3), start_k=8)
    assert [router.num_active(layer, 0) for layer in range(9)] == [3, 3, 3, 3, 3, 3, 2, 2, 1]
    assert router(RouterInput.of(torch.eye(4))).load.sum() == 12
