"""What the router hash promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.hash import Hash
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=4, d_expert=8, num_experts=6)


def routed(router: Hash, words: torch.Tensor) -> Routing:
    return router(RouterInput.of(torch.zeros(words.numel(), 4), token_ids=words))


def test_equal_words_go_to_equal_experts_whatever_their_vectors() -> None:
    words = torch.tensor([5, 9, 5, 7, 9])
    router = Hash(SHAPE, num_words=10, assignment="random", top_k=2)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    routing = router(RouterInput.of(x, token_ids=words))
    chosen = [set(routing.expert_ids[routing.token_ids == token].tolist()) for token in range(5)]
    assert chosen[0] == chosen[2]
    assert chosen[1] == chosen[4]
    assert routing.weights.tolist() == [0.5] * 10


def test_random_tables_are_about_even_and_balanced_ones_exactly() -> None:
    words = torch.arange(6000)
    loads = {
        kind: routed(Hash(SHAPE, num_words=6000, assignment=kind, top_k=2), words).load
        for kind in ("random", "balanced")
    }
    pairs = Hash(SHAPE, num_words=6000, top_k=2).table.sort(-1).values.unique(dim=0)
    assert pairs.shape[0] == 15
    assert loads["balanced"].tolist() == [2000] * 6
    assert loads["random"].min() < 2000 < loads["random"].max() < 2200
    assert not torch.equal(Hash(SHAPE, num_words=60).table, Hash(SHAPE, num_words=60, seed=1).table)


def test_refit_gives_each_word_to_the_expert_least_busy_so_far() -> None:
    counts = torch.tensor([50, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    router = Hash(LayerShape(d_model=4, d_expert=8, num_experts=3), num_words=12)
    router.refit(counts)
    # Ten rare words fill the other experts up to the frequent one's 50; the last goes to the first.
    loads = routed(router, torch.arange(12).repeat_interleave(counts)).load
    assert sorted(loads.tolist()) == [50, 50, 60]
    assert router.table[:, 0].tolist() == [0] + [1, 2] * 5 + [0]


def test_refit_evens_out_words_as_unequal_as_those_of_a_language() -> None:
    counts = (1e5 / torch.arange(1, 501)).long()
    words = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    router = Hash(SHAPE, num_words=500, top_k=2)
    text = words.repeat_interleave(counts)
    before = routed(router, text).load
    router.refit(torch.zeros(500, dtype=torch.long).scatter(0, words, counts))
    after = routed(router, text).load
    assert before.max() / before.float().mean() > 1.05
    assert after.max() / after.float().mean() < 1.01
    assert (router.table[:, 0] != router.table[:, 1]).all()


def test_a_refitted_table_is_saved_with_the_router() -> None:
    router, again = (Hash(SHAPE, num_words=20) for _ in range(2))
    router.refit(torch.arange(20))
    again.load_state_dict(router.state_dict())
    assert torch.equal(router.table, again.table)
    assert not torch.equal(router.table, Hash(SHAPE, num_words=20).table)


def test_words_beyond_the_table_wrap_around_and_wrong_counts_are_refused() -> None:
    router = Hash(SHAPE, num_words=10)
    assert torch.equal(
        routed(router, torch.tensor([3])).expert_ids, routed(router, torch.tensor([13])).expert_ids
    )
    with pytest.raises(UserError, match="made for 10 vocabulary entries"):
        router.refit(torch.ones(9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_counts_that_are_none_are_refused(bad: float) -> None:
    counts = torch.ones(10)
    counts[3] = bad
    with pytest.raises(UserError, match="counts of Hash must be finite and not negative"):
        Hash(SHAPE, num_words=10).refit(counts)
