"""What the router attention_aware promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods._scores import entropy
from mixtura.methods.routers.attention_aware import AttentionAware
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))


def attention() -> torch.Tensor:
    """Two sequences of five tokens, causal."""
    drawn = torch.rand(10, 5, generator=torch.Generator().manual_seed(1)).tril_().view(10, 5)
    drawn[5:] = drawn[:5]
    drawn = drawn * (torch.arange(5) <= torch.arange(10)[:, None] % 5)
    return drawn / drawn.sum(-1, keepdim=True)


def given(x: torch.Tensor) -> RouterInput:
    places = torch.arange(10)
    return RouterInput.of(x, attention=attention(), positions=places % 5, sequence_ids=places // 5)


def test_scores_are_the_attention_weighted_mean_of_the_own_sequences_scores() -> None:
    router = AttentionAware(SHAPE)
    routing = router(given(tokens()))
    own = (tokens() @ router.weight.T).softmax(-1)
    for token in range(10):
        first = token // 5 * 5
        expected = sum(attention()[token, j] * own[first + j] for j in range(token % 5 + 1))
        torch.testing.assert_close(routing.scores[token], expected)
        mine = routing.expert_ids[routing.token_ids == token]
        assert set(mine.tolist()) == set(expected.topk(2).indices.tolist())


def test_mean_of_logits() -> None:
    router = AttentionAware(SHAPE, mean_of="logits")
    logits = tokens() @ router.weight.T
    expected = torch.cat([attention()[:5] @ logits[:5], attention()[5:] @ logits[5:]]).softmax(-1)
    torch.testing.assert_close(router(given(tokens())).scores, expected)


def test_routing_fluctuates_less_than_the_tokens_own() -> None:
    router = AttentionAware(SHAPE, top_k=1)
    before, after = tokens(), tokens() + 0.5 * tokens(7)
    moved = (router(given(before)).scores - router(given(after)).scores).abs().mean()
    own = ((before @ router.weight.T).softmax(-1) - (after @ router.weight.T).softmax(-1)).abs().mean()
    assert moved < 0.8 * own


def test_of_sure_tokens_that_disagree_the_mean_is_unsure_and_of_those_that_agree_sure() -> None:
    router = AttentionAware(LayerShape(d_model=2, d_expert=8, num_experts=2), top_k=1)
    with torch.no_grad():
        router.weight.copy_(20 * torch.eye(2))
    half = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    for second, sure in ((1, False), (0, True)):
        x = torch.stack([torch.eye(2)[0], torch.eye(2)[second]])
        scores = router(RouterInput.of(x, attention=half, positions=torch.arange(2))).scores
        assert (entropy(scores)[1] < 0.1) == sure
