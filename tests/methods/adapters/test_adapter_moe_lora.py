"""What the adapter moe_lora promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_sites import linear_site

from mixtura.adapting.changing import add_to_rows
from mixtura.methods.adapters.moe_lora import MoeLora
from mixtura.types import RouterInput


def test_a_token_gets_its_experts_products_by_their_shares() -> None:
    """Written out token by token and expert by expert."""
    made = MoeLora(linear_site(), rank=3, alpha=6.0, num_experts=4, top_k=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.b.copy_(torch.randn(made.b.shape, generator=generator))
    x = torch.randn(5, 16, generator=generator)
    change = made.change(RouterInput.of(x))
    assert change.shares is not None
    found = add_to_rows(torch.zeros(5, 20), x, change, None)
    for token in range(5):
        scores = (x[token] @ made.gate.T).softmax(-1)
        best = scores.argsort(descending=True)[:2]
        weights = scores[best] / scores[best].sum()
        parts = [w * 2.0 * made.b[e] @ (made.a[e] @ x[token]) for w, e in zip(weights, best, strict=True)]
        torch.testing.assert_close(found[token], torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)


def test_even_use_has_the_least_loss() -> None:
    made = MoeLora(linear_site(), rank=2, num_experts=4, top_k=1, balance=1.0)
    with torch.no_grad():
        made.gate.zero_()
        made.gate[:, :4] = 50 * torch.eye(4)
    even, uneven = torch.eye(16)[:4], torch.eye(16)[[0, 0, 0, 0]]
    losses = [made.change(RouterInput.of(x, training=True)).losses["balance"] for x in (even, uneven)]
    torch.testing.assert_close(torch.stack(losses), torch.tensor([1.0, 4.0]))
