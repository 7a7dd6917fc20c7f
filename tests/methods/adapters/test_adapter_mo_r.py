"""What the adapter mo_r promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_sites import linear_site

from mixtura.methods.adapters.mo_r import MoR
from mixtura.types import RouterInput


def test_routers_votes_are_mixed_token_by_token() -> None:
    made = MoR(linear_site(), rank=2, num_experts=4, top_k=2, num_routers=3)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    shares = made.change(RouterInput.of(x)).shares
    for token in range(5):
        say = (made.router.main @ x[token]).softmax(-1)
        votes = torch.stack([(rows @ x[token]).softmax(-1) for rows in made.router.routers])
        scores = (say[:, None] * votes).sum(0)
        best = scores.argsort(descending=True)[:2]
        expected = torch.zeros(4)
        expected[best] = scores[best] / scores[best].sum()
        torch.testing.assert_close(shares[token], expected, rtol=1e-4, atol=1e-6)


def test_no_two_sites_have_the_same_routers() -> None:
    one, other = MoR(linear_site(0)), MoR(linear_site(1))
    assert not torch.equal(one.router.main, other.router.main)
