"""The arena's text: sequences to train on, and held-out ones with the bytes that each token stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import specimen
from mixtura.data.text import DOMAINS, held_out
from mixtura.data.tokens import encode_text
from mixtura.train.text import Stream, streams_of

NUM_HELD_OUT = 32  # sequences of each domain
# Labels of these names, which some methods ask for, hold the domain.
LABELS = ("domain", "language", "modality", "environment", "accent")


@final
@dataclass(frozen=True, slots=True)
class HeldOut:
    """Sequences of one domain and the bytes of their predicted tokens."""

    input_ids: Int[Tensor, "S Q"]
    num_bytes: int
    domain: int


@final
@dataclass(frozen=True, slots=True)
class Text:
    """Everything that is read: streams to train on by domain, and held-out sequences."""

    streams: Mapping[str, Stream]
    held_out: tuple[HeldOut, ...]
    vocab_size: int


def load_text(sequence_length: int, seed: int = 0) -> Text:
    """The specimen's text, encoded by the specimen's tokenizer; held-out sequences of a length."""
    tokenizer = load_tokenizer(specimen.path())
    parts = tuple(
        _held_out(domain, place, tokenizer, sequence_length) for place, domain in enumerate(DOMAINS)
    )
    return Text(streams_of(DOMAINS, None, tokenizer, seed), parts, len(tokenizer))


def _held_out(domain: str, place: int, tokenizer: Any, length: int) -> HeldOut:
    needed = NUM_HELD_OUT * length
    documents = held_out(8 * needed, domains=(domain,), passage_chars=1 << 20)
    ids = [token for one in documents for token in encode_text(one.text, tokenizer)][:needed]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    special = set(tokenizer.all_special_ids)
    # Of a byte-level vocabulary every character of an entry is one byte.
    sizes = [0 if t in special else len(tokenizer.convert_ids_to_tokens(t)) for t in range(len(tokenizer))]
    return HeldOut(rows, int(torch.tensor(sizes)[rows[:, 1:]].sum()), place)


def labels_of(domains: Float[Tensor, " S"] | Int[Tensor, " S"]) -> dict[str, Tensor]:
    """Labels under every name: the domain, and that every token is conditional on a prompt."""
    return {**dict.fromkeys(LABELS, domains), "conditional": torch.ones_like(domains)}
