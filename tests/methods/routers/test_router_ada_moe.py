"""What the router ada_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.ada_moe import AdaMoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_weights_are_those_of_the_true_experts_renormalised() -> None:
    router = AdaMoe(SHAPE, num_null=3, num_choices=3)
    routing = router(RouterInput.of(tokens()))
    probabilities = (tokens() @ torch.cat([router.weight, router.null]).T).softmax(-1).detach()
    counts = set()
    for token in range(40):
        chosen = [e for e in probabilities[token].topk(3).indices.tolist() if e < 4]
        total = sum(float(probabilities[token, e]) for e in chosen)
        mine = routing.token_ids == token
        assert routing.expert_ids[mine].tolist() == sorted(chosen)
        expected = [float(probabilities[token, e]) / total for e in sorted(chosen)]
        assert routing.weights[mine].tolist() == pytest.approx(expected)
        counts.add(len(chosen))
    assert len(counts) > 2, "tokens must differ in how many experts they use"


def test_a_token_of_null_experts_alone_gets_nothing_and_passes_no_bad_gradient() -> None:
    router = AdaMoe(SHAPE, num_null=2, num_choices=2)
    with torch.no_grad():
        router.null.copy_(100 * tokens(1).expand(2, -1))
    layer = MoELayer(router, Experts(SHAPE))
    output, routing = layer(RouterInput.of(tokens(1)))
    assert routing.token_ids.numel() == 0
    assert (output == 0).all()
    mixed, _ = layer(RouterInput.of(torch.cat([tokens(1), -tokens(1)])))
    mixed.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def loss(weight: torch.Tensor, null: torch.Tensor, x: torch.Tensor, num_choices: int) -> float:
    shape = LayerShape(d_model=x.shape[1], d_expert=8, num_experts=weight.shape[0])
    router = AdaMoe(shape, num_null=null.shape[0], num_choices=num_choices, coefficient=1.0)
    with torch.no_grad():
        router.weight.copy_(weight)
        router.null.copy_(null)
    return router(RouterInput.of(x)).losses["balance"].item()


def test_balance_loss_by_hand() -> None:
    # Two true and two null experts, one choice: tokens 0, 1 take true ones, tokens 2, 3 the same null one.
    rows = 5 * torch.eye(4)
    x = torch.eye(4)[[0, 1, 2, 2]]
    found = loss(rows[:2], rows[2:], x, 1)
    likely = (x @ rows.T).softmax(-1).mean(0)
    loads = torch.tensor([1 / 4, 1 / 4, 1 / 4, 1 / 4])  # null loads 2/4 and 0 count as their mean
    assert found == pytest.approx(float(4 * (loads * likely).sum()))


def test_null_experts_need_not_be_balanced_among_themselves() -> None:
    even = loss(5 * torch.eye(4)[:2], 5 * torch.eye(4)[2:], torch.eye(4)[[0, 1, 2, 3]], 1)
    skewed = loss(5 * torch.eye(4)[:2], 5 * torch.eye(4)[2:], torch.eye(4)[[0, 1, 2, 2]], 1)
    true_skewed = loss(5 * torch.eye(4)[:2], 5 * torch.eye(4)[2:], torch.eye(4)[[0, 0, 2, 3]], 1)
    assert skewed == pytest.approx(even)
    assert true_skewed > even + 0.1


def test_padding_does_not_count_in_the_loss() -> None:
    router = AdaMoe(SHAPE)
    x = tokens(12)
    valid = torch.arange(12) < 7
    padded = router(RouterInput(x=x, valid=valid)).losses["balance"]
    torch.testing.assert_close(padded, router(RouterInput.of(x[:7])).losses["balance"])


def test_without_null_experts_it_is_top_k() -> None:
    routing = AdaMoe(SHAPE, num_null=0, num_choices=2)(RouterInput.of(tokens()))
    assert torch.bincount(routing.token_ids).tolist() == [2] * 40


def test_null_experts_far_ahead_leave_gradients_finite() -> None:
    router = AdaMoe(LayerShape(d_model=1, d_expert=8, num_experts=2), num_null=1, num_choices=2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-1.0], [-1.0]]))
        router.null.fill_(0.0)
    x = torch.tensor([[102.0], [104.0], [110.0]], requires_grad=True)
    routing = router(RouterInput.of(x))
    (100 * routing.weights.square().sum()).backward()
    for slope in (x.grad, router.weight.grad, router.null.grad):
        assert slope is not None
        assert torch.isfinite(slope).all()


def test_as_many_true_experts_on_average_as_another_router_has() -> None:
    for num_experts, num_null, top_k, expected in ((8, 8, 2, 4), (8, 4, 2, 3), (128, 8, 8, 9), (4, 0, 2, 2)):
        shape = LayerShape(d_model=4, d_expert=8, num_experts=num_experts)
        given = {"num_null": num_null}
        assert AdaMoe.settings_for(top_k, shape, given) == {"num_choices": expected}
        AdaMoe(shape, **given, **AdaMoe.settings_for(top_k, shape, given))
