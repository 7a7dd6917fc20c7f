"""What the router normalized_sigmoid promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.normalized_sigmoid import NormalizedSigmoid
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(20, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("over", ["chosen", "all"])
def test_weights_by_a_plain_loop(over: str) -> None:
    router = NormalizedSigmoid(SHAPE, top_k=3, over=over)
    routing = router(RouterInput.of(tokens()))
    for token in range(20):
        scores = [1 / (1 + float(torch.exp(-(tokens()[token] @ row)))) for row in router.weight.detach()]
        chosen = sorted(sorted(range(6), key=lambda e: -scores[e])[:3])
        total = {"chosen": sum(scores[e] for e in chosen), "all": sum(scores)}[over]
        mine = routing.token_ids == token
        assert routing.expert_ids[mine].tolist() == chosen
        assert routing.weights[mine].tolist() == pytest.approx([scores[e] / total for e in chosen])


def test_experts_do_not_compete_for_score() -> None:
    router = NormalizedSigmoid(SHAPE)
    before = router(RouterInput.of(tokens())).scores
    with torch.no_grad():
        router.weight[0] += 3.0
    after = router(RouterInput.of(tokens())).scores
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = NormalizedSigmoid(SHAPE, top_k=2, over="all")
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 9.0])
    routing = router(RouterInput.of(tokens(), selection_bias=bias))
    assert routing.load.tolist() == [0, 0, 0, 0, 20, 20]
    shares = routing.scores / routing.scores.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights, shares[routing.token_ids, routing.expert_ids])


def test_one_allowed_expert_has_all_the_weight() -> None:
    allowed = torch.zeros(20, 6, dtype=torch.bool)
    allowed[:, 4] = True
    routing = NormalizedSigmoid(SHAPE, top_k=2)(RouterInput.of(tokens(), allowed=allowed))
    assert routing.expert_ids.tolist() == [4] * 20
    torch.testing.assert_close(routing.weights, torch.ones(20))


@pytest.mark.parametrize("over", ["chosen", "all"])
def test_vanishing_scores_give_finite_weights_and_gradients(over: str) -> None:
    router = NormalizedSigmoid(LayerShape(d_model=1, d_expert=8, num_experts=4), over=over)
    with torch.no_grad():
        router.weight.copy_(torch.linspace(-1.1, -1.4, 4)[:, None])
    routing = router(RouterInput.of(torch.tensor([[60.0], [75.0], [100.0]])))
    assert torch.isfinite(routing.weights).all()
    (10 * routing.weights.sum()).backward()
    assert router.weight.grad is not None
    assert torch.isfinite(router.weight.grad).all()
