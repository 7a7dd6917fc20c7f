"""What the router speech_moe2 promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.speech_moe2 import SpeechMoe2
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=4)
DOMAINS, ACCENTS = torch.arange(20) % 3 - 1, torch.arange(20) % 2
WORDS = torch.arange(20) * 7


def tokens() -> torch.Tensor:
    return torch.randn(20, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def inputs(**labels: torch.Tensor) -> RouterInput:
    return RouterInput.of(tokens(), token_ids=WORDS, labels=labels)


def test_rows_read_the_token_and_three_embeddings() -> None:
    router = SpeechMoe2(SHAPE, vocab_size=100, num_domains=2, num_accents=2, width=5)
    routing = router(inputs(domain=DOMAINS, language=ACCENTS))
    for token in range(20):
        joined = [
            tokens()[token],
            router.words[WORDS[token] % 100],
            # Unknown is the row after those of the two domains.
            router.domains[2 if DOMAINS[token] < 0 else DOMAINS[token]],
            router.accents[ACCENTS[token]],
        ]
        logits = router.weight @ torch.cat(joined)
        torch.testing.assert_close(routing.logits[token], logits)
        mine = routing.token_ids == token
        assert routing.expert_ids[mine].tolist() == [int(logits.argmax())]
        torch.testing.assert_close(routing.weights[mine][0], logits.softmax(-1).max())


def test_each_global_label_changes_the_routing() -> None:
    router = SpeechMoe2(SHAPE)
    base = router(inputs(domain=DOMAINS, language=ACCENTS)).logits
    for labels in (
        {"domain": DOMAINS + 1, "language": ACCENTS},
        {"domain": DOMAINS, "language": ACCENTS + 1},
    ):
        assert ((router(inputs(**labels)).logits - base).abs().amax(-1) > 1e-4).all()


def test_missing_labels_are_unknown_ones() -> None:
    router = SpeechMoe2(SHAPE)
    unknown = torch.full((20,), -1)
    assert torch.equal(router(inputs()).logits, router(inputs(domain=unknown, language=unknown)).logits)


def test_losses_by_hand() -> None:
    router = SpeechMoe2(SHAPE, sparsity_coefficient=2.0, importance_coefficient=3.0)
    routing = router(inputs())
    probabilities = routing.scores
    sparsity = sum((row / row.norm()).sum() for row in probabilities) / 20
    torch.testing.assert_close(routing.losses["sparsity"], 2 * sparsity)
    importance = 4 * (probabilities.mean(0) ** 2).sum()
    torch.testing.assert_close(routing.losses["importance"], 3 * importance)


def test_a_label_beyond_its_number_is_refused() -> None:
    with pytest.raises(UserError, match="knows 2 labels 'domain'"):
        SpeechMoe2(SHAPE, num_domains=2)(inputs(domain=torch.full((20,), 2)))
