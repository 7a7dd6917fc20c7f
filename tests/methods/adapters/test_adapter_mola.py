"""What the adapter mola promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from methods.adapters.adapter_sites import linear_site

from mixtura.methods.adapters.mola import Mola
from mixtura.types import RouterInput


@pytest.mark.parametrize(
    ("num_layers", "stretches", "expected"),
    [
        (4, None, [2, 4, 6, 8]),
        (8, None, [2, 2, 4, 4, 6, 6, 8, 8]),
        (6, None, [2, 2, 4, 6, 6, 8]),
        (3, [5], [5] * 3),
    ],
)
def test_higher_layers_have_more_experts(num_layers: int, stretches: list[int], expected: list[int]) -> None:
    sites = [linear_site(layer, num_layers=num_layers) for layer in range(num_layers)]
    made = [Mola(site, rank=2, experts_by_depth=stretches) for site in sites]
    assert [one.num_experts for one in made] == [len(one.a) for one in made] == expected


def test_the_best_experts_share_one_whole() -> None:
    made = Mola(linear_site(3), rank=2, top_k=3)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    shares = made.change(RouterInput.of(x)).shares
    for token in range(7):
        scores = (x[token] @ made.gate.T).softmax(-1)
        best = scores.argsort(descending=True)[:3]
        expected = torch.zeros(8)
        expected[best] = scores[best] / scores[best].sum()
        torch.testing.assert_close(shares[token], expected)
