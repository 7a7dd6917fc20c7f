"""KL, perplexity and exact answers against hand-made distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixtura.fitting.quality import HeldOut, Scores, join, score_chunk, summarise


def held_out(lengths: list[int], answers: list[tuple[int, int]], width: int = 6) -> HeldOut:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    marked = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        start, end = answers[row]
        marked[row, start:end] = True
    return HeldOut(
        input_ids=torch.arange(len(lengths) * width).reshape(len(lengths), width) % 5,
        attention_mask=mask,
        domains=np.arange(len(lengths)) % 2,
        domain_names=("code", "prose"),
        groups=tuple("sums" if a != b else "" for a, b in answers),
        answers=marked,
    )


def scores_for(text: HeldOut, logits: torch.Tensor, reference: torch.Tensor):
    predicted = text.predicted
    targets = text.input_ids.roll(-1, 1)[predicted]
    return score_chunk(reference[predicted], logits[predicted], targets)


def test_the_same_logits_lose_nothing() -> None:
    text = held_out([6, 4], [(0, 0), (2, 4)])
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    quality = summarise([(scores_for(text, logits, logits), text)], 0.0)
    assert (quality.kl, quality.kl_low, quality.kl_high, quality.equal_top) == (0.0, 0.0, 0.0, 1.0)
    assert quality.num_tokens == 5 + 3


def test_kl_and_perplexity_equal_the_formulas() -> None:
    text = held_out([6, 4], [(0, 0), (0, 0)])
    generator = torch.Generator().manual_seed(1)
    reference, logits = torch.randn(2, 2, 6, 5, generator=generator).double()
    quality = summarise([(scores_for(text, logits, reference), text)], 0.0)
    p, q = reference.softmax(-1), logits.softmax(-1)
    predicted = text.predicted
    kl = (p * (p / q).log()).sum(-1)[predicted]
    nll = -q.log().gather(2, text.input_ids.roll(-1, 1)[..., None]).squeeze(-1)
    assert math.isclose(quality.kl, kl.mean().item(), rel_tol=1e-5)
    assert math.isclose(quality.perplexity["all"], nll[predicted].mean().exp().item(), rel_tol=1e-5)
    assert math.isclose(quality.perplexity["prose"], nll[1][predicted[1]].mean().exp().item(), rel_tol=1e-5)
    assert quality.kl_low <= quality.kl <= quality.kl_high


def test_an_answer_counts_only_when_every_token_of_it_is_right() -> None:
    text = held_out([6, 6], [(2, 5), (2, 5)])
    logits = torch.zeros(2, 6, 5)
    logits.scatter_(2, text.input_ids.roll(-1, 1)[..., None], 9.0)
    assert summarise([(scores_for(text, logits, logits), text)], 0.0).accuracy == {"sums": 1.0, "all": 1.0}
    logits[1, 2] = -logits[1, 2]
    assert summarise([(scores_for(text, logits, logits), text)], 0.0).accuracy == {"sums": 0.5, "all": 0.5}
    logits[0, 0] = -logits[0, 0]
    assert summarise([(scores_for(text, logits, logits), text)], 0.0).accuracy["all"] == 0.5


def test_joining_chunks_keeps_the_order() -> None:
    text = held_out([6], [(0, 0)])
    logits = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(2))
    whole = scores_for(text, logits, logits.flip(-1))
    targets = text.input_ids.roll(-1, 1)[0]
    parts = [
        score_chunk(logits.flip(-1)[0, i : i + 1], logits[0, i : i + 1], targets[i : i + 1]) for i in range(5)
    ]
    joined = join(parts)
    assert np.allclose(joined.kl, whole.kl)
    assert (joined.right == whole.right).all()


def test_a_domain_counts_by_its_share_whatever_its_length() -> None:
    """Beside a plain loop over tokens."""
    text = HeldOut(
        input_ids=torch.zeros(3, 5, dtype=torch.long),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
        domains=np.array([0, 0, 1]),
        domain_names=("prose", "mine"),
        groups=("", "", ""),
        answers=torch.zeros(3, 5, dtype=torch.bool),
    )
    kl = np.arange(1.0, 8.0)
    same = np.array([True, False, True, True, False, True, True])
    scores = Scores(kl=kl, nll=np.ones(7), equal_top=same, right=same)
    quality = summarise([(scores, text)], 0.0, shares={"mine": 0.25})
    prose, mine = kl[:6].mean(), kl[6]
    assert quality.kl == pytest.approx(0.75 * prose + 0.25 * mine)
    assert quality.equal_top == pytest.approx(0.75 * same[:6].mean() + 0.25)
    assert quality.kl_by_domain["mine"] == mine
    assert quality.kl_low <= quality.kl <= quality.kl_high
    assert summarise([(scores, text)], 0.0).kl == pytest.approx(kl.mean())
    assert quality.perplexity == summarise([(scores, text)], 0.0).perplexity
