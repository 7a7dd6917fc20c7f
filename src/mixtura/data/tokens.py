"""Turn documents into padded batches of tokens, with the domain of every sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.data.records import Document, TextError, readable
from mixtura.errors import SettingError


@final
@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of tokens padded on the right to the longest, ready for a model.

    `attention_mask` is 1 where a token is real; `domains` gives each sequence's place in
    `domain_names`. Shapes: `input_ids` and `attention_mask` [S, T], `domains` [S].
    """

    input_ids: Int[Tensor, "S T"]
    attention_mask: Int[Tensor, "S T"]
    domains: Int[Tensor, " S"]
    domain_names: tuple[str, ...]

    @property
    def num_sequences(self) -> int:
        """How many sequences there are."""
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """How many tokens are real, padding excluded."""
        return int(self.attention_mask.sum())

    def split(self, max_tokens: int) -> Iterator[TokenBatch]:
        """Smaller batches in the same order, each of at most `max_tokens` with its own padding.

        A sequence longer than that makes a batch of its own.
        """
        lengths = self.attention_mask.sum(dim=1).tolist()
        start = longest = 0
        for place, length in enumerate(lengths):
            longest = max(longest, length)
            if place > start and longest * (place - start + 1) > max_tokens:
                yield self._slice(start, place)
                start, longest = place, length
        if lengths:
            yield self._slice(start, len(lengths))

    def _slice(self, start: int, stop: int) -> TokenBatch:
        mask = self.attention_mask[start:stop]
        width = int(mask.sum(dim=1).max())
        return TokenBatch(
            self.input_ids[start:stop, :width], mask[:, :width], self.domains[start:stop], self.domain_names
        )


def encode_text(
    text: str, tokenizer: Any, num_embeddings: int | None = None, *, begin: bool = True
) -> list[int]:
    """Token ids of a text with the tokenizer's start token, once, where it uses one.

    A chat template writes the start token itself. Without `begin` the text goes on after another one and
    gets no token that is not in it.

    Raises:
        TextError: the model has no embedding for one of them; see `check_ids`.
    """
    return encode_texts([text], tokenizer, num_embeddings, begin=begin)[0]


def encode_texts(
    texts: Sequence[str], tokenizer: Any, num_embeddings: int | None = None, *, begin: bool = True
) -> list[list[int]]:
    """Token ids of texts at once, each as `encode_text` gives them."""
    start = getattr(tokenizer, "bos_token", None)
    mended = [readable(text) for text in texts]
    bare = [not begin or (bool(start) and text.startswith(str(start))) for text in mended]
    found: dict[int, list[int]] = {}
    for special in (False, True):
        places = [place for place in range(len(texts)) if bare[place] != special]
        if places:
            chosen = [mended[place] for place in places]
            encoded = tokenizer(chosen, add_special_tokens=special, verbose=False)["input_ids"]
            found |= dict(zip(places, encoded, strict=True))
    made = [found[place] for place in range(len(texts))]
    for ids in made:
        check_ids(ids, tokenizer, num_embeddings)
    return made


def check_ids(ids: Sequence[int], tokenizer: Any, num_embeddings: int | None) -> None:
    """Refuse tokens that a model with so many embeddings has none for; None checks nothing.

    A tokenizer may well have more tokens than its model has embeddings as long as no text has those.

    Raises:
        TextError: there is such a token; the message has both numbers.
    """
    highest = max(ids, default=0)
    if num_embeddings is not None and highest >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise TextError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings} embeddings, and the text "
            f"has token {highest}, {token!r}; give the tokenizer the model was trained with, or resize its "
            "embeddings"
        )


def num_embeddings_of(config: Any) -> int | None:
    """How many tokens a model with a configuration of transformers has embeddings for, if that says so."""
    found = getattr(config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) else None


def vocabulary_size(tokenizer: Any) -> int:
    """How many embeddings a model for a tokenizer needs: one more than its highest id, gaps included."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def pad_id(
    tokenizer: Any, num_embeddings: int | None = None, names: Sequence[str] = ("pad_token_id",)
) -> int:
    """A token to pad with: the first of the tokenizer's that the model has an embedding for, else 0."""
    found = [token for name in names if (token := getattr(tokenizer, name, None)) is not None]
    return next((int(token) for token in found if num_embeddings is None or token < num_embeddings), 0)


def _chunks(ids: list[int], max_length: int) -> Iterator[list[int]]:
    """Consecutive parts of at most `max_length` tokens; a single token left over predicts nothing."""
    for start in range(0, len(ids), max_length):
        part = ids[start : start + max_length]
        if len(part) > 1:
            yield part


def _parts(
    documents: Sequence[Document], domain: str, tokenizer: Any, max_length: int, num_embeddings: int | None
) -> Iterator[list[int]]:
    """The sequences of one domain, encoded as they are asked for."""
    for document in documents:
        if document.domain == domain:
            yield from _chunks(encode_text(document.text, tokenizer, num_embeddings), max_length)


def encode_documents(
    documents: Sequence[Document],
    tokenizer: Any,
    max_length: int = 512,
    max_tokens: int | None = None,
    num_embeddings: int | None = None,
) -> TokenBatch:
    """Encode documents, cut them into sequences and pad these on the right.

    Longer documents give several sequences. Under `max_tokens` the domains are filled evenly: the
    next sequence always comes from the domain that has the fewest tokens so far. Sequences are
    then sorted by length, longest first, which keeps padding small when the batch is split. With
    `num_embeddings`, those of the model, no token is let through that has none.

    Raises:
        SettingError: where nothing is left to encode, or a size is too small.
        TextError: the model has no embedding for one of the tokens.
    """
    if max_length < 2 or (max_tokens is not None and max_tokens < 2):
        raise SettingError(f"max_length and max_tokens must be at least 2, got {max_length}, {max_tokens}")
    names = tuple(dict.fromkeys(document.domain for document in documents))
    queues = {name: _parts(documents, name, tokenizer, max_length, num_embeddings) for name in names}
    rows = _fill_evenly(queues, max_tokens)
    if not rows:
        raise SettingError("there is no text to encode; give documents of at least two tokens")
    rows.sort(key=lambda row: -len(row[1]))
    return _pad(rows, names, pad_id(tokenizer, num_embeddings))


def _fill_evenly(
    queues: dict[str, Iterator[list[int]]], max_tokens: int | None
) -> list[tuple[str, list[int]]]:
    """Sequences with their domains, taken so that the domains keep about the same size."""
    rows: list[tuple[str, list[int]]] = []
    sizes = dict.fromkeys(queues, 0)
    total = 0
    while sizes and (max_tokens is None or total < max_tokens):
        name = min(sizes, key=lambda key: sizes[key])
        part = next(queues[name], None)
        if part is None:
            del sizes[name]
            continue
        if max_tokens is not None:
            part = part[: max(2, max_tokens - total)]
        rows.append((name, part))
        sizes[name] += len(part)
        total += len(part)
    return rows


def _pad(rows: list[tuple[str, list[int]]], names: tuple[str, ...], pad: int) -> TokenBatch:
    width = max(len(ids) for _, ids in rows)
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for place, (_, ids) in enumerate(rows):
        input_ids[place, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[place, : len(ids)] = 1
    domains = torch.tensor([names.index(name) for name, _ in rows], dtype=torch.int64)
    return TokenBatch(input_ids, mask, domains, names)
