"""What the router noisy_top_k promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.methods.routers.noisy_top_k import NoisyTopK
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def routed(router: NoisyTopK, seed: int, x: Tensor | None = None) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    return router(RouterInput.of(tokens() if x is None else x, training=True, generator=generator))


def test_weights_are_a_softmax_over_the_chosen_logits() -> None:
    routing = routed(NoisyTopK(SHAPE, top_k=3), 1)
    for token in range(20):
        mine = routing.token_ids == token
        best = routing.logits[token].topk(3)
        assert set(routing.expert_ids[mine].tolist()) == set(best.indices.tolist())
        expected = torch.zeros(6).scatter(0, best.indices, best.values.softmax(-1))
        torch.testing.assert_close(routing.weights[mine], expected[routing.expert_ids[mine]])


def test_noise_is_that_of_the_generator_and_absent_without_training() -> None:
    router = NoisyTopK(SHAPE)
    assert torch.equal(routed(router, 1).logits, routed(router, 1).logits)
    assert not torch.equal(routed(router, 1).logits, routed(router, 2).logits)
    quiet = router(RouterInput.of(tokens(), generator=torch.Generator()))
    torch.testing.assert_close(quiet.logits, tokens() @ router.weight.T)
    assert set(quiet.losses) == {"importance"}


def test_expected_load_is_the_frequency_over_many_draws_of_one_expert() -> None:
    router = NoisyTopK(SHAPE, top_k=2, load_coefficient=1.0)
    x = tokens(1)
    clean = x @ router.weight.T
    spread = torch.nn.functional.softplus(torch.zeros(6)) + 1e-2
    noisy = clean + spread * torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    found = router._expected_load(clean, noisy, spread.expand(1, 6), torch.tensor([True]))
    generator = torch.Generator().manual_seed(4)
    for expert in range(6):
        drawn = noisy.repeat(20000, 1)
        drawn[:, expert] = clean[0, expert] + spread[expert] * torch.randn(20000, generator=generator)
        share = (drawn.topk(2).indices == expert).any(-1).float().mean()
        assert found[expert].item() == pytest.approx(share.item(), abs=0.015)


def test_losses_are_zero_when_balanced_and_large_when_one_expert_has_all() -> None:
    router = NoisyTopK(SHAPE, top_k=1, importance_coefficient=1.0)
    with torch.no_grad():
        router.weight.zero_()
    router.weight.data[0] = 50.0
    collapsed = router(RouterInput.of(torch.ones(12, 16)))
    # All on one of six: the squared coefficient of variation is 6 - 1.
    assert collapsed.losses["importance"].item() == pytest.approx(5.0)
    even = NoisyTopK(LayerShape(6, 8, 6), top_k=1, importance_coefficient=1.0)
    with torch.no_grad():
        even.weight.copy_(torch.eye(6))
    balanced = even(RouterInput.of(torch.eye(6)))
    assert balanced.losses["importance"].item() == pytest.approx(0.0, abs=1e-6)


def test_all_experts_have_no_bar_to_beat() -> None:
    routing = routed(NoisyTopK(SHAPE, top_k=6), 1)
    assert routing.losses["load"].item() == 0
