"""What the router router_upcycling promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.router_upcycling import RouterUpcycling
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=12, d_expert=8, num_experts=5)


def drawn(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def test_the_score_is_the_mean_vote_of_attention_like_routers() -> None:
    router = RouterUpcycling(SHAPE, num_routers=3, width=4, top_k=2)
    x = drawn(10, 12)
    routing = router(RouterInput.of(x))
    for token in range(10):
        votes = []
        for number in range(3):
            query = router.query[number] @ x[token]
            votes.append((router.key[number] @ query / 2.0).softmax(-1))
        scores = sum(votes) / 3
        torch.testing.assert_close(routing.scores[token], scores)
        top = scores.topk(2)
        mine = routing.token_ids == token
        assert set(routing.expert_ids[mine].tolist()) == set(top.indices.tolist())
        torch.testing.assert_close(
            routing.weights[mine].sort(descending=True).values, top.values / top.values.sum()
        )


def test_begins_from_heads_and_what_describes_experts() -> None:
    router = RouterUpcycling(SHAPE, num_routers=3, width=4)
    query, key, features = drawn(4, 4, 12), drawn(2, 4, 12, seed=1), drawn(5, 12, seed=2)
    router.start_from_heads(query, key, features)
    torch.testing.assert_close(router.query.detach(), query[:3])
    # Heads 0 and 1 share the first key head, head 2 has the second.
    for number, head in enumerate((0, 0, 1)):
        torch.testing.assert_close(router.key[number].detach(), features @ key[head].T)
    # The router's product is then the attention score between the token and the expert's features.
    x = drawn(1, 12, seed=3)
    routing = router(RouterInput.of(x))
    votes = [(query[n] @ x[0]) @ (key[h] @ features.T) / 2.0 for n, h in enumerate((0, 0, 1))]
    torch.testing.assert_close(routing.scores[0].detach(), torch.stack(votes).softmax(-1).mean(0))


def test_without_features_experts_differ_and_it_can_still_be_trained() -> None:
    router = RouterUpcycling(SHAPE, num_routers=2, width=4)
    router.start_from_heads(drawn(2, 4, 12), drawn(2, 4, 12, seed=1))
    assert torch.pdist(router.key[0]).min() > 0.1
    router(RouterInput.of(drawn(6, 12))).weights.max().backward()
    assert router.key.grad is not None


def test_heads_that_do_not_fit_are_refused() -> None:
    router = RouterUpcycling(SHAPE, num_routers=3, width=4)
    for query, key in (((2, 4, 12), (2, 4, 12)), ((3, 5, 12), (3, 5, 12)), ((3, 4, 11), (3, 4, 11))):
        with pytest.raises(UserError, match="choose num_routers and width"):
            router.start_from_heads(drawn(*query), drawn(*key))
    with pytest.raises(UserError, match="2 key heads cannot serve 3"):
        router.start_from_heads(drawn(3, 4, 12), drawn(2, 4, 12))
    with pytest.raises(UserError, match=r"features of shape \(5, 12\), got \(4, 12\)"):
        router.start_from_heads(drawn(3, 4, 12), drawn(3, 4, 12), drawn(4, 12))
