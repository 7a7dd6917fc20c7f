"""Top-k that begins as noise: what it mixes, and that it is plain top-k afterwards."""

from __future__ import annotations

import torch

from mixtura.methods.routers.stochastic_warmup import StochasticWarmup
from mixtura.methods.routers.top_k import TopK
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=6, d_expert=4, num_experts=5)


def tokens(step: int, *, training: bool = True, seed: int = 1) -> RouterInput:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return RouterInput.of(x, step=step, training=training, generator=generator)


def test_after_the_warm_up_and_at_inference_it_is_top_k() -> None:
    router, plain = StochasticWarmup(SHAPE, warmup_steps=8, seed=3), TopK(SHAPE, seed=3)
    for inputs in (tokens(8), tokens(0, training=False)):
        found, wanted = router(inputs), plain(inputs)
        assert torch.equal(found.expert_ids, wanted.expert_ids)
        torch.testing.assert_close(found.weights, wanted.weights)


def test_logits_are_the_mixture_by_hand() -> None:
    router, inputs = StochasticWarmup(SHAPE, warmup_steps=8, seed=3), tokens(2)
    noise = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    wanted = 0.75 * noise + 0.25 * inputs.x @ router.weight.T
    torch.testing.assert_close(router(inputs).logits, wanted)


def test_the_first_step_does_not_see_the_tokens() -> None:
    router, blind = StochasticWarmup(SHAPE, warmup_steps=8), tokens(0)
    blind.x.zero_()
    assert torch.equal(router(blind).expert_ids, router(tokens(0)).expert_ids)
    assert not torch.equal(router(blind).expert_ids, router(tokens(0, seed=2)).expert_ids)
