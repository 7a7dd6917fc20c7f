"""What the router x_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.x_moe import XMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(0))


def test_logits_are_cosines_in_few_dimensions_over_the_temperature() -> None:
    router = XMoe(SHAPE, num_dims=3, temperature=0.5)
    logits = router(RouterInput.of(tokens())).logits
    for token in range(20):
        low = router.project @ tokens()[token]
        for expert in range(6):
            row = router.embeddings[expert]
            cosine = (low @ row) / (low.norm() * row.norm())
            assert logits[token, expert].item() == pytest.approx(cosine.item() / 0.5, abs=1e-5)


def test_lengths_of_tokens_and_embeddings_do_not_matter() -> None:
    router = XMoe(SHAPE)
    before = router(RouterInput.of(tokens()))
    with torch.no_grad():
        router.embeddings.mul_(torch.arange(1.0, 7.0)[:, None])
    after = router(RouterInput.of(3 * tokens()))
    torch.testing.assert_close(before.logits, after.logits)
    assert torch.equal(before.expert_ids, after.expert_ids)


def test_the_temperature_is_learned_and_stays_positive() -> None:
    router = XMoe(SHAPE, temperature=0.1)
    router(RouterInput.of(tokens())).weights.sum().backward()
    # Surer weights are larger ones: a lower temperature raises them.
    assert router.log_temperature.grad is not None
    assert router.log_temperature.grad < 0
    with torch.no_grad():
        router.log_temperature.sub_(50.0)
    assert torch.isfinite(router(RouterInput.of(tokens())).scores).all()


def test_gates() -> None:
    soft, sigmoid = (
        XMoe(SHAPE, top_k=2, gate=gate)(RouterInput.of(tokens())) for gate in ("softmax", "sigmoid")
    )
    assert torch.equal(soft.expert_ids, sigmoid.expert_ids)
    torch.testing.assert_close(soft.scores, soft.logits.softmax(-1))
    torch.testing.assert_close(sigmoid.scores, 1 / (1 + (-sigmoid.logits).exp()))
    torch.testing.assert_close(sigmoid.weights, sigmoid.scores[sigmoid.token_ids, sigmoid.expert_ids])
    even = XMoe(SHAPE, top_k=2, renormalize=True)(RouterInput.of(tokens()))
    sums = torch.zeros(20).index_add(0, even.token_ids, even.weights)
    torch.testing.assert_close(sums, torch.ones(20))
