"""What the router read_me promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.routers.read_me import ReadMe
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=5)
WORDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def routed(router: ReadMe, words: torch.Tensor = WORDS, x: float = 0.0) -> Routing:
    fields = {"token_ids": words, "positions": torch.arange(words.numel())}
    return router(RouterInput.of(torch.full((words.numel(), 16), x), **fields))


def test_every_layer_follows_the_first() -> None:
    router = ReadMe(SHAPE, width=8, num_words=10)
    first = routed(router)
    generator = torch.Generator().manual_seed(0)
    later = first
    for layer in (1, 2):
        x = torch.randn(8, 16, generator=generator)
        later = router(RouterInput.of(x, layer=layer, state=later.state))
        assert torch.equal(later.expert_ids, first.expert_ids)
        assert torch.equal(later.weights, first.weights)


def test_hidden_states_are_not_read_and_earlier_words_are() -> None:
    router = ReadMe(SHAPE, width=8, num_words=10)
    assert torch.equal(routed(router, x=0.0).logits, routed(router, x=3.0).logits)
    other = WORDS.clone()
    other[2] = 7
    same = (routed(router).logits == routed(router, other).logits).all(-1)
    assert same.tolist() == [True, True] + [False] * 6


def test_logits_by_a_plain_loop() -> None:
    router = ReadMe(SHAPE, width=6, num_words=10, seed=3).double()
    words = router.embedding[WORDS]
    query, key, value, out = router.attention

    def turned(vector: torch.Tensor, place: int) -> torch.Tensor:
        made = torch.zeros(6, dtype=torch.float64)
        for i in range(3):
            angle = place / 10000 ** (i / 3)
            made[i] = vector[i] * math.cos(angle) - vector[i + 3] * math.sin(angle)
            made[i + 3] = vector[i] * math.sin(angle) + vector[i + 3] * math.cos(angle)
        return made

    with torch.no_grad():
        for token in range(8):
            asked = turned(query @ words[token], token)
            near = torch.stack([asked @ turned(key @ words[t], t) / 6**0.5 for t in range(token + 1)])
            seen = (near.softmax(0)[:, None] * (words[: token + 1] @ value.T)).sum(0)
            hidden = words[token] + out @ seen
            inner = router.up @ hidden
            hidden = hidden + router.down @ (inner * torch.sigmoid(inner))
            normal = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
            found = routed(router).logits[token]
            # The angles are of float32.
            torch.testing.assert_close(found, router.head @ normal, atol=1e-5, rtol=1e-5)


def test_sequences_do_not_see_each_other() -> None:
    router = ReadMe(SHAPE, width=8, num_words=10)
    fields = {
        "token_ids": WORDS,
        "positions": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        "sequence_ids": torch.tensor([0, 1] * 4),
    }
    both = router(RouterInput.of(torch.zeros(8, 16), **fields)).logits
    for sequence in (0, 1):
        torch.testing.assert_close(both[sequence::2], routed(router, WORDS[sequence::2]).logits)


def test_weights_are_probabilities_or_one() -> None:
    weighted, hard = (ReadMe(SHAPE, num_words=10, weighted=flag) for flag in (True, False))
    torch.testing.assert_close(routed(weighted).weights.sort().values, _top(weighted).sort().values)
    assert torch.equal(routed(hard).weights, torch.ones(8))


def _top(router: ReadMe) -> torch.Tensor:
    return routed(router).scores.max(-1).values


def test_distillation_by_hand_and_that_it_teaches() -> None:
    router = ReadMe(SHAPE, width=8, num_words=10)
    generator = torch.Generator().manual_seed(1)
    logits, overlap = torch.randn(4, 5, generator=generator), torch.rand(4, 5, generator=generator)
    expected = 0.0
    for row, shares in zip(logits.log_softmax(-1).tolist(), overlap.tolist(), strict=True):
        best = shares.index(max(shares))
        smooth = [0.1 + 0.5 * (e == best) for e in range(5)]
        soft = [math.exp(10 * (s - sum(shares) / 5)) for s in shares]
        expected -= 0.75 * sum(p * q for p, q in zip(smooth, row, strict=True))
        expected -= 0.25 * sum(p / sum(soft) * q for p, q in zip(soft, row, strict=True))
    assert router.distillation(logits, overlap).item() == pytest.approx(expected / 4, rel=1e-5)
    wanted = torch.eye(5)[WORDS % 5]
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        router.distillation(routed(router).logits, wanted).backward()
        optimizer.step()
    assert torch.equal(routed(router).scores.argmax(-1), WORDS % 5)
