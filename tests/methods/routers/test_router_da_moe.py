"""What the router da_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.da_moe import DaMoe
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)
# Four tokens of one sequence; received in total: 2.0, 0.1, 0.4, 1.5.
SEEN = torch.tensor([[0.5, 0.0, 0.1, 0.4], [0.5, 0.0, 0.1, 0.4], [0.5, 0.0, 0.1, 0.4], [0.5, 0.1, 0.1, 0.3]])


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def encoded(router: DaMoe, attention: torch.Tensor, **more: torch.Tensor) -> Routing:
    count = attention.shape[0]
    more.setdefault("positions", torch.arange(count))
    return router(RouterInput.of(tokens(count), attention=attention, causal=False, **more))


@pytest.mark.parametrize(
    ("mean", "most", "counts"), [(2.0, 4, [4, 1, 1, 3]), (2.0, 3, [3, 1, 1, 3]), (4.0, 6, [6, 1, 2, 6])]
)
def test_the_number_of_experts_follows_the_attention_received(
    mean: float, most: int, counts: list[int]
) -> None:
    routing = encoded(DaMoe(SHAPE, mean_experts=mean, max_experts=most), SEEN)
    assert routing.token_ids.bincount().tolist() == counts


def test_the_experts_are_the_most_probable_ones_weighted_by_probability() -> None:
    router = DaMoe(SHAPE)
    routing = encoded(router, SEEN)
    probabilities = (tokens() @ router.weight.T).softmax(-1)
    for token, count in enumerate([4, 1, 1, 3]):
        mine = routing.token_ids == token
        best = probabilities[token].topk(count).indices
        assert set(routing.expert_ids[mine].tolist()) == set(best.tolist())
        torch.testing.assert_close(routing.weights[mine], probabilities[token, routing.expert_ids[mine]])
    even = encoded(DaMoe(SHAPE, renormalize=True), SEEN)
    torch.testing.assert_close(torch.zeros(4).index_add(0, even.token_ids, even.weights), torch.ones(4))


def test_attention_is_received_within_the_own_sequence_and_not_from_padding() -> None:
    router = DaMoe(SHAPE)
    both = torch.cat([SEEN, SEEN.flip(1), SEEN[:1]])
    routing = encoded(
        router,
        both,
        positions=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]),
        sequence_ids=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]),
        valid=torch.arange(9) < 8,
    )
    # The second sequence has the columns of the first in reverse.
    assert routing.token_ids.bincount().tolist() == [4, 1, 1, 3, 3, 1, 1, 4]


def test_a_decoder_goes_by_what_a_token_gives_to_itself() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.1, 0.8, 0], [0.4, 0.3, 0.2, 0.1]])
    routing = DaMoe(SHAPE)(RouterInput.of(tokens(), attention=rows, positions=torch.arange(4)))
    # Importances: 1 * 1, 2 * 0.5, 3 * 0.8, 4 * 0.1, times two, rounded, within 1 and 4.
    assert routing.token_ids.bincount().tolist() == [2, 2, 4, 1]


@pytest.mark.parametrize("num_experts", [2, 3])
def test_no_more_experts_than_there_are(num_experts: int) -> None:
    router = DaMoe(LayerShape(d_model=2, d_expert=8, num_experts=num_experts))
    fields = {"attention": torch.eye(3), "positions": torch.arange(3), "causal": True}
    load = router(RouterInput.of(torch.ones(3, 2), **fields)).token_ids.bincount()
    assert load.tolist() == [2, min(4, num_experts), num_experts]
