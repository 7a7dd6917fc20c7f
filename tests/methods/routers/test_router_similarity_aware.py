"""What the router similarity_aware promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.routers.similarity_aware import SimilarityAware
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)
PLACES = torch.arange(10)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))


def given(x: torch.Tensor, **more: bool) -> RouterInput:
    """Two sequences of five tokens."""
    return RouterInput.of(x, positions=PLACES % 5, sequence_ids=PLACES // 5, **more)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_scores_are_the_mean_weighted_by_a_softmax_of_similarities(causal: bool, similarity: str) -> None:
    router = SimilarityAware(SHAPE, similarity=similarity, temperature=0.5)
    x = tokens()
    own = (x @ router.weight.T).softmax(-1)
    routing = router(given(x, causal=causal))
    for token in range(10):
        first = token // 5 * 5
        others = range(first, token + 1 if causal else first + 5)
        alike = []
        for other in others:
            length = 4.0 if similarity == "dot" else (x[token].norm() * x[other].norm()).item()
            alike.append(math.exp((x[token] @ x[other]).item() / length / 0.5))
        expected = sum(a * own[other] for a, other in zip(alike, others, strict=True)) / sum(alike)
        torch.testing.assert_close(routing.scores[token], expected)
        mine = routing.expert_ids[routing.token_ids == token]
        assert set(mine.tolist()) == set(expected.topk(2).indices.tolist())


def test_similar_tokens_are_routed_alike_though_their_own_scores_differ() -> None:
    router = SimilarityAware(LayerShape(d_model=2, d_expert=8, num_experts=2), top_k=1, similarity="cosine")
    with torch.no_grad():
        # The two tokens, nearly equal, lie on either side of the border between the experts.
        router.weight.copy_(torch.tensor([[50.0, -50.0], [-50.0, 50.0]]))
    x = torch.tensor([[1.0, 0.98], [0.99, 1.0]])
    routing = router(RouterInput.of(x, positions=torch.arange(2), causal=False))
    assert routing.logits.argmax(-1).tolist() == [0, 1]
    assert routing.expert_ids.unique().numel() == 1


def test_padding_resembles_nobody() -> None:
    x = tokens()
    valid = PLACES % 5 < 4
    padded = SimilarityAware(SHAPE)(
        RouterInput.of(x, positions=PLACES % 5, sequence_ids=PLACES // 5, valid=valid, causal=False)
    )
    kept = valid.nonzero().squeeze(-1)
    alone = SimilarityAware(SHAPE)(
        RouterInput.of(x[kept], positions=PLACES[kept] % 5, sequence_ids=PLACES[kept] // 5, causal=False)
    )
    torch.testing.assert_close(padded.scores[kept], alone.scores)


def test_high_temperature_is_the_plain_mean() -> None:
    router = SimilarityAware(SHAPE, temperature=1e4)
    scores = router(given(tokens(), causal=False)).scores
    own = (tokens() @ router.weight.T).softmax(-1)
    torch.testing.assert_close(scores[:5], own[:5].mean(0).expand(5, -1), atol=1e-3, rtol=0)
