"""Sequences of tokens by number: which text each of a training's sequences holds, with its domain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mixtura.data import chains, tasks
from mixtura.data.corpora import training_documents
from mixtura.data.reading import read
from mixtura.data.text import DOMAINS
from mixtura.data.tokens import encode_texts
from mixtura.errors import SettingError, UnknownNameError, UserError

Stream = NDArray[np.int64]
NUM_TASKS = 20_000


@final
class Windows:
    """Sequences cut from a stream of tokens, in an order that is shuffled anew in each epoch.

    ``key`` are numbers that set the order; a sequence is one token longer than ``length``, since the
    first predicts the second.
    """

    def __init__(self, tokens: Stream, length: int, key: Sequence[int]) -> None:
        self._tokens = tokens
        self._length = length
        self._key = tuple(key)
        self._num = (len(tokens) - length - 1) // length
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        if self._num < 1:
            raise UserError(
                f"there are {len(tokens)} tokens of text, too few for sequences of {length}; "
                "give more text or a lower sequence_length"
            )

    def __getitem__(self, number: int) -> Stream:
        epoch, index = divmod(number, self._num)
        if epoch not in self._orders:
            rng = np.random.default_rng([*self._key, epoch])
            shift = int(rng.integers(self._length))
            self._orders[epoch] = shift, rng.permutation(self._num)
        shift, order = self._orders[epoch]
        start = shift + int(order[index]) * self._length
        return self._tokens[start : start + self._length + 1]


@final
class Sequences(Dataset[dict[str, Any]]):
    """Training sequences by number, domains in turn: the same whatever was read before.

    An item has ``input_ids [length]``, ``labels [length]``, the number of its ``domain`` and, where
    documents are told apart by the token ``start_id`` that begins each, ``position_ids [length]``.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        num_sequences: int,
        length: int,
        seed: int,
        start_id: int | None = None,
    ) -> None:
        self.domains = tuple(streams)
        self._num_sequences = num_sequences
        self._start_id = start_id
        self._windows = [Windows(t, length, (seed, place)) for place, t in enumerate(streams.values())]

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, number: int) -> dict[str, Any]:
        turn, place = divmod(number, len(self.domains))
        # Dividing by the number of domains, every process and every batch would see some domains only.
        place = (place + turn) % len(self.domains)
        return item(self._windows[place][turn], place, self._start_id)


def item(tokens: Stream, domain: int, start_id: int | None) -> dict[str, Any]:
    """What a training sequence is made of; ``tokens`` has one more, which the last one predicts."""
    ids = torch.from_numpy(tokens[:-1].copy())
    made = {"input_ids": ids, "labels": ids, "domain": domain}
    return made if start_id is None else made | {"position_ids": positions(ids, start_id)}


def positions(ids: Int[Tensor, " Q"], start_id: int) -> Int[Tensor, " Q"]:
    """Places within each document: they start again at every ``start_id``.

    >>> positions(torch.tensor([5, 6, 0, 7, 0, 8]), start_id=0).tolist()
    [0, 1, 0, 1, 0, 1]
    """
    places = torch.arange(len(ids))
    begun = torch.where(ids == start_id, places, 0).cummax(0).values
    return places - begun


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of sequences, with their domains as labels of tokens."""
    ids = torch.stack([one["input_ids"] for one in items])
    domain = torch.tensor([one["domain"] for one in items])
    batch = {"input_ids": ids, "labels": ids.clone(), "token_labels": {"domain": domain}}
    if "position_ids" in items[0]:
        batch["position_ids"] = torch.stack([one["position_ids"] for one in items])
    return batch


def encode(texts: Sequence[str], tokenizer: Any, key: str) -> Stream:
    """Texts one after another as one stream of tokens, in an order that ``key`` sets."""
    shuffled = list(texts)
    Random(key).shuffle(shuffled)
    encoded = encode_texts(shuffled, tokenizer)
    return np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])


def digest(streams: Mapping[str, Stream]) -> str:
    """A digest of all text that a training reads."""
    total = hashlib.sha256()
    for name, tokens in streams.items():
        total.update(f"{name}|{len(tokens)}|".encode())
        total.update(tokens.tobytes())
    return total.hexdigest()


def document_start(tokenizer: Any) -> int:
    """The token that the tokenizer begins every text with.

    Raises:
        SettingError: it begins texts with none.
    """
    first = tokenizer("a")["input_ids"][0]
    if first != tokenizer.bos_token_id:
        raise SettingError("the tokenizer begins texts with no token of its own; leave documents_apart out")
    return int(first)


def training_texts(domain: str, seed: int) -> list[str]:
    """The texts of a domain that may be trained on.

    Raises:
        UnknownNameError: there is no such domain.
    """
    if domain == "tasks":
        return [one.document().text for one in islice(tasks.stream("training", seed), NUM_TASKS)]
    if domain in chains.DOMAINS:
        made = chains.chains(int(domain.rpartition("_")[2]), "training", seed)
        return [one.document().text for one in islice(made, NUM_TASKS)]
    if domain not in DOMAINS:
        raise UnknownNameError("domain", domain, (*DOMAINS, *chains.DOMAINS))
    return [document.text for document in training_documents(domain)]


def streams_of(domains: Sequence[str], text: str | None, tokenizer: Any, seed: int) -> dict[str, Stream]:
    """A stream of tokens for every domain: of the text that comes along, or of one's own.

    Raises:
        UserError: a domain or the text does not exist, or there is too little of it.
    """
    if text is None:
        return {d: encode(training_texts(d, seed), tokenizer, f"{seed}|{d}") for d in dict.fromkeys(domains)}
    by_domain: dict[str, list[str]] = {}
    for document in read(Path(text), tokenizer):
        by_domain.setdefault(document.domain, []).append(document.text)
    return {d: encode(texts, tokenizer, f"{seed}|{d}") for d, texts in sorted(by_domain.items())}
