"""What the router top_k promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from mixtura.errors import SettingError
from mixtura.methods.routers.top_k import TopK
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(count: int = 20) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def table(routing: Routing) -> torch.Tensor:
    dense = torch.zeros_like(routing.scores)
    dense[routing.token_ids, routing.expert_ids] = routing.weights
    return dense


@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_the_router_of_qwen3_moe(renormalize: bool) -> None:
    config = Qwen3MoeConfig(hidden_size=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=renormalize)
    theirs = Qwen3MoeTopKRouter(config)
    ours = TopK(SHAPE, top_k=2, renormalize=renormalize)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    x = tokens()
    _, weights, chosen = theirs(x)
    expected = torch.zeros(20, 6).scatter(1, chosen, weights)
    torch.testing.assert_close(table(ours(RouterInput.of(x))), expected)


def test_equals_the_router_of_mixtral() -> None:
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=3))
    ours = TopK(SHAPE, top_k=3)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    x = tokens()
    _, weights, chosen = theirs(x)
    expected = torch.zeros(20, 6).scatter(1, chosen, weights)
    torch.testing.assert_close(table(ours(RouterInput.of(x))), expected)


def test_of_equal_scores_the_lowest_index_is_taken() -> None:
    router = TopK(SHAPE, top_k=2)
    with torch.no_grad():
        router.weight.zero_()
    routing = router(RouterInput.of(tokens()))
    assert routing.expert_ids.unique().tolist() == [0, 1]
    assert (routing.weights == 0.5).all()


def test_selection_bias_chooses_and_does_not_weigh() -> None:
    router = TopK(SHAPE, top_k=1, renormalize=False)
    bias = torch.tensor([0.0, 0, 0, 0, 0, 10])
    x = tokens()
    routing = router(RouterInput.of(x, selection_bias=bias))
    assert (routing.expert_ids == 5).all()
    probability = (x @ router.weight.T).softmax(-1)[:, 5]
    torch.testing.assert_close(routing.weights, probability)


def test_seed_decides_the_parameters() -> None:
    one, same, other = TopK(SHAPE, seed=1), TopK(SHAPE, seed=1), TopK(SHAPE, seed=2)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("top_k", [0, 7])
def test_more_experts_than_there_are(top_k: int) -> None:
    with pytest.raises(SettingError, match=rf"top_k of TopK must be in \[1, 6\], got {top_k}"):
        TopK(SHAPE, top_k=top_k)
