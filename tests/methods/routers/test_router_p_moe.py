"""What the router p_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.p_moe import PMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=3)
SEQUENCES = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 2, 2, 0, 1])
VALID = torch.tensor([True] * 10 + [False, True])


def tokens() -> torch.Tensor:
    return torch.randn(12, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", ["taken", "all"])
def test_equals_a_plain_loop_over_images_and_experts(weights: str) -> None:
    router = PMoe(SHAPE, patches=3, weights=weights)
    x = tokens()
    routing = router(RouterInput(x=x, valid=VALID, sequence_ids=SEQUENCES))
    found = torch.zeros(12, 3)
    found[routing.token_ids, routing.expert_ids] = routing.weights
    expected = torch.zeros(12, 3)
    for sequence in range(3):
        mine = ((sequence == SEQUENCES) & VALID).nonzero().squeeze(-1)
        for expert in range(3):
            scores = x[mine] @ router.weight[expert]
            top = scores.topk(min(3, len(mine)))
            shares = top.values.softmax(0) if weights == "taken" else scores.softmax(0)[top.indices]
            expected[mine[top.indices], expert] = shares
    torch.testing.assert_close(found, expected)


def test_a_label_irrelevant_patch_goes_nowhere_and_experts_may_share_one() -> None:
    router = PMoe(SHAPE, patches=1)
    x = torch.zeros(4, 8)
    x[2] = router.weight.detach().sum(0) * 10
    routing = router(RouterInput.of(x))
    assert routing.token_ids.tolist() == [2, 2, 2]
    assert routing.expert_ids.tolist() == [0, 1, 2]
    assert routing.weights.tolist() == [1, 1, 1]


def test_of_equal_scores_the_earlier_patch_is_taken() -> None:
    routing = PMoe(SHAPE, patches=2)(RouterInput.of(torch.ones(5, 8)))
    assert routing.token_ids.tolist() == [0, 1] * 3


@pytest.mark.parametrize("weights", ["taken", "all"])
def test_padding_alone_and_padding_far_above_the_rest_leave_gradients_finite(weights: str) -> None:
    router = PMoe(LayerShape(d_model=4, d_expert=8, num_experts=2), patches=2, weights=weights)
    sequences = torch.arange(8) // 4
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x[3] = 1e4
    valid = (sequences == 0) & (torch.arange(8) != 3)
    routing = router(RouterInput(x=x, valid=valid, sequence_ids=sequences))
    routing.weights.square().sum().backward()
    alone = PMoe(router.shape, patches=2, weights=weights)
    alone(RouterInput.of(x[:3])).weights.square().sum().backward()
    assert router.weight.grad is not None
    torch.testing.assert_close(router.weight.grad, alone.weight.grad)
