"""What the router product_key promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.product_key import ProductKey
from mixtura.types import LayerShape, RouterInput


def tokens() -> torch.Tensor:
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [1, 3, 7, 24])
def test_finds_the_best_of_the_whole_grid(top_k: int) -> None:
    router = ProductKey(LayerShape(d_model=8, d_expert=1, num_experts=24), top_k=top_k)
    routing = router(RouterInput.of(tokens()))
    rows, columns = routing.scores.split([4, 6], dim=1)
    every = (rows[:, :, None] * columns[:, None]).flatten(1)
    expected = every.topk(top_k, dim=1)
    for token in range(20):
        mine = routing.token_ids == token
        assert set(routing.expert_ids[mine].tolist()) == set(expected.indices[token].tolist())
        torch.testing.assert_close(
            routing.weights[mine].sort(descending=True).values, expected.values[token], rtol=1e-4, atol=1e-6
        )


def test_axes_count_the_rows_and_columns_of_the_chosen() -> None:
    router = ProductKey(LayerShape(d_model=8, d_expert=1, num_experts=24), top_k=3)
    routing = router(RouterInput.of(tokens()))
    rows, columns = routing.axes
    for token in range(20):
        experts = routing.expert_ids[routing.token_ids == token]
        for axis, ids in ((rows, experts // 6), (columns, experts % 6)):
            mine = axis.token_ids == token
            assert axis.expert_ids[mine].tolist() == sorted(set(ids.tolist()))
            torch.testing.assert_close(
                axis.weights[mine].sum(), routing.weights[routing.token_ids == token].sum()
            )
    assert routing.num_experts == 24
    assert routing.places == (rows, columns)
