"""What the adapter lora_moe promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_sites import linear_site

from mixtura.methods.adapters.lora_moe import LoraMoe
from mixtura.types import RouterInput


def test_every_token_gets_all_experts_by_a_softmax() -> None:
    made = LoraMoe(linear_site(), rank=2, num_experts=3)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    shares = made.change(RouterInput.of(x)).shares
    for token in range(5):
        scores = [float(torch.exp(x[token] @ made.gate[e])) for e in range(3)]
        torch.testing.assert_close(shares[token], torch.tensor(scores) / sum(scores), rtol=1e-5, atol=1e-6)


def test_equal_use_costs_nothing_and_padding_does_not_count() -> None:
    made = LoraMoe(linear_site(), rank=2, num_experts=3, balance=2.0)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True, True, True, True, False, False])
    loss = made.change(RouterInput.of(x, valid=valid, training=True)).losses["balance"]
    sums = torch.stack([(x[t] @ made.gate.T).softmax(-1) for t in range(4)]).sum(0)
    expected = 2.0 * ((sums - sums.mean()) ** 2).mean() / sums.mean() / 4
    torch.testing.assert_close(loss, expected)
    assert made.change(RouterInput.of(x)).losses == {}
    with torch.no_grad():
        made.gate.zero_()
    assert float(made.change(RouterInput.of(x, training=True)).losses["balance"]) < 1e-9
