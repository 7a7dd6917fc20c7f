"""Trying an upcycled model: perplexity by domain beside the dense models, its function, its balance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixtura.checkpoints.skeleton import AnyView, open_checkpoint
from mixtura.fitting.quality import ALL, HeldOut, Scores, join, score_chunk
from mixtura.fitting.scoring import own_scores
from mixtura.fitting.texts import as_batch
from mixtura.fitting.upcycling.records import Balance, Beside, Tried
from mixtura.running.observing.checkpoint import observe_checkpoint
from mixtura.running.stream import Streamed

Notify = Callable[[str], None]


def tried(
    view: AnyView, name: str, held_out: Sequence[HeldOut], notify: Notify
) -> tuple[Tried, list[Tensor]]:
    """A model on held-out text by itself, and its final states."""
    notify(f"trying {name} on held-out text")
    streamed = Streamed(view)
    found = [own_scores(streamed, text) for text in held_out]
    return summary(name, held_out, [scores for scores, _ in found]), [states for _, states in found]


def tried_beside(
    view: AnyView, name: str, held_out: Sequence[HeldOut], states: Sequence[Tensor], notify: Notify
) -> tuple[Tried, Beside]:
    """A model beside the final states of another with the same head."""
    notify(f"trying {name} on held-out text")
    streamed = Streamed(view)
    scores, differences, moments = list[Scores](), list[float](), list[tuple[float, float, int]]()
    for text, reference in zip(held_out, states, strict=True):
        targets, chunks = text.input_ids.roll(-1, 1).reshape(-1), list[Scores]()

        def on_both(
            logits: Tensor,
            other: Tensor,
            positions: Tensor,
            targets: Tensor = targets,
            into: list[Scores] = chunks,
        ) -> None:
            into.append(score_chunk(other, logits, targets[positions]))
            differences.append(float((logits.float() - other.float()).abs().max()))
            wide = other.double()
            moments.append((float(wide.sum()), float((wide * wide).sum()), wide.numel()))

        streamed.run_beside(
            text.input_ids, text.attention_mask, beside=reference, on_both=on_both, wanted=text.predicted
        )
        scores.append(join(chunks))
    return summary(name, held_out, scores), compared(scores, differences, moments)


def compared(
    scores: Sequence[Scores], differences: Sequence[float], moments: Sequence[tuple[float, float, int]]
) -> Beside:
    """What two models' logits came to: scores, largest differences, and sums of the other's logits."""
    total, squares, number = (sum(values) for values in zip(*moments, strict=True))
    kl, same = (np.concatenate([getattr(one, what) for one in scores]) for what in ("kl", "equal_top"))
    return Beside(
        kl=float(kl.mean()),
        same_token=float(same.mean()),
        largest=max(differences),
        spread=math.sqrt(max(squares / number - (total / number) ** 2, 0.0)),
    )


def balance_of(out: Path, held_out: Sequence[HeldOut], notify: Notify) -> tuple[Balance, ...]:
    """How evenly the result's experts share held-out tokens, by layer."""
    notify("counting which experts tokens reach")
    trace = observe_checkpoint(open_checkpoint(out), as_batch(tuple(held_out)), progress=False)
    found = []
    for layer in trace.layers:
        load = layer.load.double()
        even = max(float(load.mean()), 1e-12)
        found.append(
            Balance(layer=layer.index, busiest=float(load.max()) / even, idle=int((load == 0).sum()))
        )
    return tuple(found)


def summary(name: str, held_out: Sequence[HeldOut], scores: Sequence[Scores]) -> Tried:
    """Perplexity by domain of a model's scores."""
    sums: dict[str, float] = {ALL: 0.0}
    counts: dict[str, int] = {ALL: 0}
    for text, own in zip(held_out, scores, strict=True):
        sequences = torch.nonzero(text.predicted)[:, 0].numpy()
        for sequence, nll in zip(sequences, own.nll, strict=True):
            domain = text.domain_names[text.domains[sequence]]
            for key in (ALL, domain):
                sums[key] = sums.get(key, 0.0) + float(nll)
                counts[key] = counts.get(key, 0) + 1
    perplexity = {key: math.exp(min(total / max(counts[key], 1), 700.0)) for key, total in sums.items()}
    return Tried(name=name, perplexity=perplexity, num_tokens=counts[ALL])
