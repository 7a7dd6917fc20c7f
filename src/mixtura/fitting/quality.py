"""How far a model is from the original: KL, perplexity, equal top tokens and exact answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from mixtura.fitting.records import Quality

ALL = "all"
_RESAMPLES = 1000


@final
@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out text as tokens, ready to be predicted. The letter P counts predicted positions.

    Attributes:
        input_ids: tokens, padded.
        attention_mask: 1 for tokens, 0 for padding.
        domains: domain of each sequence, as an index into ``domain_names``.
        domain_names: names of the domains.
        groups: what each sequence counts towards in the accuracy table (a task's name, or the
            domain), or "" for a sequence without an answer.
        answers: which tokens belong to an answer that must be predicted exactly.
    """

    input_ids: Int[Tensor, "S T"]
    attention_mask: Int[Tensor, "S T"]
    domains: Int[ndarray, " S"]
    domain_names: tuple[str, ...]
    groups: tuple[str, ...]
    answers: Bool[Tensor, "S T"]

    @property
    def predicted(self) -> Bool[Tensor, "S T"]:
        """Positions whose next token is judged: a token that is followed by another."""
        valid = self.attention_mask.bool()
        following = torch.zeros_like(valid)
        following[:, :-1] = valid[:, 1:]
        return valid & following


@final
@dataclass(frozen=True, slots=True)
class Scores:
    """What is measured at each predicted position."""

    kl: Float[ndarray, " P"]
    nll: Float[ndarray, " P"]
    equal_top: Bool[ndarray, " P"]
    right: Bool[ndarray, " P"]


def score_chunk(
    reference: Float[Tensor, "P V"], logits: Float[Tensor, "P V"], targets: Int[Tensor, " P"]
) -> Scores:
    """Compare next-token logits with the original's, position by position.

    Args:
        reference: the original's logits.
        logits: the judged model's logits.
        targets: the tokens that really came next.
    """
    wanted = torch.log_softmax(reference.float(), -1)
    given = torch.log_softmax(logits.float(), -1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).clamp(min=0)
    top = logits.argmax(-1)
    return Scores(
        kl=kl.double().numpy(),
        nll=-given.gather(1, targets[:, None]).squeeze(1).double().numpy(),
        equal_top=(top == reference.argmax(-1)).numpy(),
        right=(top == targets).numpy(),
    )


def join(chunks: list[Scores]) -> Scores:
    """One record from consecutive chunks."""
    parts = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("kl", "nll", "equal_top", "right")
    }
    return Scores(**parts)


@final
@dataclass(frozen=True, slots=True)
class _Sums:
    """The same scores added up per sequence."""

    kl: Float[ndarray, " S"]
    nll: Float[ndarray, " S"]
    equal_top: Float[ndarray, " S"]
    counts: Int[ndarray, " S"]
    domains: list[str]
    groups: list[str]
    has_answer: Bool[ndarray, " S"]
    exact: Bool[ndarray, " S"]


def _sums(scores: Scores, text: HeldOut) -> _Sums:
    predicted = text.predicted.numpy()
    num_sequences = len(predicted)
    sequences = np.nonzero(predicted)[0]
    wanted = torch.zeros_like(text.answers)
    wanted[:, :-1] = text.answers[:, 1:]
    needed = wanted.numpy() & predicted
    right = np.zeros(needed.shape, dtype=bool)
    right[predicted] = scores.right
    return _Sums(
        kl=np.bincount(sequences, scores.kl, num_sequences),
        nll=np.bincount(sequences, scores.nll, num_sequences),
        equal_top=np.bincount(sequences, scores.equal_top, num_sequences),
        counts=predicted.sum(1),
        domains=[text.domain_names[number] for number in text.domains],
        groups=list(text.groups),
        has_answer=needed.any(1),
        exact=(right | ~needed).all(1),
    )


def summarise(
    scored: Sequence[tuple[Scores, HeldOut]],
    seconds: float,
    seed: int = 0,
    shares: Mapping[str, float] | None = None,
) -> Quality:
    """Means over tokens, by domain and in all, with an interval from resampling sequences.

    An answer is exact when every token of it is the most likely one given those before.

    Args:
        scored: what was measured on each part of the text.
        seconds: that it took.
        seed: of the interval.
        shares: by domain, its share of the mean loss; domains that are not named have the rest by their
            tokens. Perplexity counts tokens alike.
    """
    parts = [_sums(scores, text) for scores, text in scored]
    kl, nll, equal_top, counts, has_answer, exact = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("kl", "nll", "equal_top", "counts", "has_answer", "exact")
    )
    domains = np.array([domain for part in parts for domain in part.domains])
    groups = np.array([group for part in parts for group in part.groups])
    masks = {ALL: counts > 0} | {str(n): (domains == n) & (counts > 0) for n in dict.fromkeys(domains)}
    weights = _weights(domains, counts, shares or {})
    low, high = _interval(kl * weights, counts * weights, seed)
    answered = {str(g): has_answer & (groups == g) for g in dict.fromkeys(groups[has_answer])}
    if answered:
        answered[ALL] = has_answer
    return Quality(
        kl=float((kl * weights).sum() / (counts * weights).sum()),
        kl_low=low,
        kl_high=high,
        equal_top=float((equal_top * weights).sum() / (counts * weights).sum()),
        perplexity={n: math.exp(nll[m].sum() / counts[m].sum()) for n, m in masks.items() if m.any()},
        kl_by_domain={n: float(kl[m].sum() / counts[m].sum()) for n, m in masks.items() if m.any()},
        accuracy={group: float(exact[mask].mean()) for group, mask in answered.items()},
        num_tokens=int(counts.sum()),
        seconds=seconds,
    )


def _weights(
    domains: ndarray, counts: Int[ndarray, " S"], shares: Mapping[str, float]
) -> Float[ndarray, " S"]:
    """What a token of each sequence counts, so that domains have their shares."""
    weights = np.ones(len(counts))
    others = ~np.isin(domains, list(shares))
    rest = 1.0 - sum(shares.values())
    total = counts.sum()
    for mask, share in [(others, rest), *((domains == name, share) for name, share in shares.items())]:
        if shares and counts[mask].sum():
            weights[mask] = share * total / counts[mask].sum()
    return weights


def _interval(sums: Float[ndarray, " S"], counts: Float[ndarray, " S"], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(sums), (_RESAMPLES, len(sums)))
    totals = np.maximum(counts[picks].sum(1), 1e-9)
    low, high = np.percentile(sums[picks].sum(1) / totals, [2.5, 97.5])
    return float(low), float(high)
