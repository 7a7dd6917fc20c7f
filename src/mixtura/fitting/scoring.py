"""Scoring a streamed model on held-out text: beside itself, or beside another with the same head."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.fitting.quality import HeldOut, Scores, join, score_chunk
from mixtura.running.stream import Streamed


def _targets(text: HeldOut) -> Tensor:
    return text.input_ids.roll(-1, 1).reshape(-1)


def scores_beside(streamed: Streamed, text: HeldOut, states: Tensor) -> Scores:
    """Scores of a model beside the states of another with the same head."""
    targets, chunks = _targets(text), list[Scores]()

    def on_both(logits: Tensor, reference: Tensor, positions: Tensor) -> None:
        chunks.append(score_chunk(reference, logits, targets[positions]))

    streamed.run_beside(
        text.input_ids, text.attention_mask, beside=states, on_both=on_both, wanted=text.predicted
    )
    return join(chunks)


def own_scores(streamed: Streamed, text: HeldOut) -> tuple[Scores, Tensor]:
    """A model beside itself, and its final states."""
    targets, chunks, states = _targets(text), list[Scores](), list[Tensor]()

    def on_logits(logits: Tensor, positions: Tensor) -> None:
        chunks.append(score_chunk(logits, logits, targets[positions]))

    streamed.run(
        text.input_ids,
        text.attention_mask,
        on_logits=on_logits,
        wanted=text.predicted,
        on_states=states.append,
    )
    return join(chunks), torch.cat(states)
