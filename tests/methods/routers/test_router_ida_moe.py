"""What the router ida_moe promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from mixtura.methods.routers.ida_moe import IdaMoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def made(**settings: int) -> IdaMoe:
    router = IdaMoe(SHAPE, num_groups=3, num_dims=4, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.log_deviations.copy_(0.3 * torch.randn(18, 4, generator=generator))
        router.mixing.copy_(torch.randn(18, generator=generator))
    return router


def codes(router: IdaMoe, x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt() @ router.encoder.T


def test_scores_are_posteriors_and_the_loss_the_likelihood_of_a_mixture_of_gaussians() -> None:
    router = made(likelihood_coefficient=1)
    routing = router(RouterInput.of(tokens(), training=True))
    parts = Independent(Normal(router.means, router.log_deviations.exp()), 1)
    code = codes(router, tokens())
    mixture = MixtureSameFamily(Categorical(logits=router.mixing), parts)
    expected = -mixture.log_prob(code).mean() / 4
    torch.testing.assert_close(routing.losses["likelihood"], expected, atol=1e-4, rtol=1e-4)
    density = parts.log_prob(code[:, None]).exp() * router.mixing.softmax(-1)
    of_expert = density.view(40, 6, 3).sum(-1)
    torch.testing.assert_close(
        routing.scores, of_expert / of_expert.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3
    )


def test_experts_of_highest_posterior_weighted_by_it() -> None:
    routing = made(top_k=2)(RouterInput.of(tokens()))
    for token in range(40):
        mine = routing.token_ids == token
        best = routing.scores[token].topk(2)
        expected = torch.zeros(6).scatter(0, best.indices, best.values / best.values.sum())
        torch.testing.assert_close(routing.weights[mine], expected[routing.expert_ids[mine]])


def test_the_task_trains_experts_and_not_the_router_and_likelihood_not_the_tokens() -> None:
    router = made()
    layer = MoELayer(router, Experts(SHAPE))
    x = tokens().requires_grad_()
    output, routing = layer(RouterInput.of(x, training=True))
    output.square().sum().backward()
    assert all(parameter.grad is None for parameter in router.parameters())
    before = x.grad.clone()
    sum(routing.losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())
    assert torch.equal(x.grad, before)


def test_likelihood_does_not_move_the_encoder() -> None:
    router = made()
    routing = router(RouterInput.of(tokens(), training=True))
    assert torch.autograd.grad(routing.losses["likelihood"], router.encoder, allow_unused=True) == (None,)


def test_trained_alone_it_finds_the_domains_of_its_input() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 16, generator=generator)
    domain = torch.arange(240) % 6
    x = centres[domain] + 0.3 * torch.randn(240, 16, generator=generator)
    router = IdaMoe(SHAPE, top_k=1, num_groups=4, num_dims=8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    first = router(RouterInput.of(x, training=True))
    for _ in range(200):
        optimizer.zero_grad()
        sum(router(RouterInput.of(x, training=True)).losses.values()).backward()
        optimizer.step()
    routing = router(RouterInput.of(x, training=True))
    for name, loss in routing.losses.items():
        assert loss < first.losses[name]
    # All tokens of a domain go together, and they are sure of it.
    expert = torch.empty(240, dtype=torch.long).scatter(0, routing.token_ids, routing.expert_ids)
    for number in range(6):
        assert torch.bincount(expert[domain == number]).max() >= 38
    assert routing.scores.max(-1).values.mean() > 0.95


@pytest.mark.parametrize("deviation", [0.0, -4.0, -8.0])
def test_narrow_gaussians_are_exact_in_float32(deviation: float) -> None:
    router = IdaMoe(SHAPE, num_dims=4, num_groups=2)
    with torch.no_grad():
        router.log_deviations.fill_(deviation)
    codes = router.means.detach()[:5] + math.exp(deviation) * torch.linspace(-1, 1, 20).view(5, 4)
    found = router._log_density(codes)
    each = torch.distributions.Normal(
        router.means.double(), (torch.exp(2 * router.log_deviations.double()) + 1e-8).sqrt()
    )
    expected = each.log_prob(codes.double()[:, None]).sum(-1) + router.mixing.double().log_softmax(-1)
    near = torch.eye(5, 12, dtype=torch.bool)
    torch.testing.assert_close(found.double()[near], expected[near], rtol=1e-5, atol=1e-4)


def test_a_token_that_repeats_for_ever_makes_no_point() -> None:
    router = IdaMoe(SHAPE, num_dims=4, num_groups=2)
    with torch.no_grad():
        router.log_deviations.fill_(-40.0)
    routing = router(RouterInput.of(torch.ones(6, SHAPE.d_model), training=True))
    assert torch.isfinite(routing.logits).all()
    sum(routing.losses.values()).backward()
    assert router.log_deviations.grad is not None
    assert torch.isfinite(router.log_deviations.grad).all()
