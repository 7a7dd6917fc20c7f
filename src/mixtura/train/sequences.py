"""Sequences of a fixed length made of examples: packed or one by one, in an order by number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mixtura.data.examples import Example
from mixtura.errors import UserError

IGNORED = -100


@final
class ExampleSequences(Dataset[dict[str, Tensor]]):
    """Training sequences by number, shuffled anew in each epoch: the same whatever was read before.

    An item has ``input_ids``, ``labels`` and ``position_ids``, which start again with every document. Packed,
    as many documents go into a sequence of ``length`` as fit; else each has one for itself. Longer documents
    are cut: where all of it is learned into several, else at the end.

    Args:
        examples: what is learned from.
        length: tokens of a sequence at most.
        num_sequences: of the whole training; None for one epoch, in the order of the examples.
        seed: of the order.
        packed: whether documents share sequences.

    Raises:
        UserError: nothing is left to learn within the length.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        *,
        num_sequences: int | None = None,
        seed: int = 0,
        packed: bool = True,
    ) -> None:
        self.pieces = _pieces(examples, length)
        if not self.pieces:
            raise UserError(
                f"every example is cut before its answer at {length} tokens; give a higher sequence_length"
            )
        self._length, self._seed, self._packed = length, seed, packed
        self._epochs: list[list[list[int]]] = []
        self._starts = [0]
        self._num_sequences = len(self._epoch(None)) if num_sequences is None else num_sequences
        self._shuffled = num_sequences is not None

    @property
    def num_cut(self) -> int:
        """Examples that were longer than a sequence."""
        return sum(piece.was_cut for piece in self.pieces)

    @property
    def per_epoch(self) -> int:
        """Sequences in which every document is seen once, about."""
        return len(self._epoch(0))

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not self._shuffled:
            return self._item(self._epoch(None)[number])
        while number >= self._starts[-1]:
            self._epochs.append(self._epoch(len(self._epochs)))
            self._starts.append(self._starts[-1] + len(self._epochs[-1]))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._item(self._epochs[epoch][number - self._starts[epoch]])

    def _epoch(self, epoch: int | None) -> list[list[int]]:
        """The documents of each sequence of an epoch; None for the order in which they were given."""
        order = np.arange(len(self.pieces))
        if epoch is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self.pieces))
        places = [int(place) for place in order]
        if not self._packed:
            return [[place] for place in places]
        return _packed([len(self.pieces[place].example) for place in places], places, self._length)

    def _item(self, places: Sequence[int]) -> dict[str, Tensor]:
        parts = [self.pieces[place].example for place in places]
        ids = np.concatenate([part.ids for part in parts])
        labels = np.concatenate([_labels(part) for part in parts])
        positions = np.concatenate([np.arange(len(part)) for part in parts])
        made = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in made.items()}


@final
class _Piece:
    """A document, or a part of one, that fits in a sequence."""

    def __init__(self, example: Example, was_cut: bool) -> None:
        self.example, self.was_cut = example, was_cut


def _pieces(examples: Sequence[Example], length: int) -> list[_Piece]:
    made = []
    for example in examples:
        several = bool(example.learned.all())
        starts = range(0, len(example), length) if several else (0,)
        for start in starts:
            part = example.cut(start, start + length)
            if part.learned[1:].any():
                made.append(_Piece(part, len(example) > length))
    return made


def _labels(example: Example) -> NDArray[np.int64]:
    labels = np.where(example.learned, example.ids, IGNORED)
    # Nothing comes before a document's first token that it could be predicted from.
    labels[0] = IGNORED
    return labels.astype(np.int64)


def _packed(lengths: Sequence[int], places: Sequence[int], room: int, most_open: int = 32) -> list[list[int]]:
    """Each document in the fullest sequence that it fits in, of the few that are still open."""
    done: list[list[int]] = []
    left: list[tuple[int, list[int]]] = []
    for length, place in zip(lengths, places, strict=True):
        fitting = [number for number, (free, _) in enumerate(left) if free >= length]
        if fitting:
            best = min(fitting, key=lambda number: left[number][0])
            free, held = left[best]
            left[best] = (free - length, [*held, place])
        else:
            left.append((room - length, [place]))
            if len(left) > most_open:
                fullest = min(range(len(left)), key=lambda number: left[number][0])
                done.append(left.pop(fullest)[1])
    return done + [held for _, held in left]


@final
class Collator:
    """Puts sequences of several lengths in one batch.

    ``apart``: padding is a document of its own after the others, which positions that start again tell apart;
    else an attention mask leaves it out.
    """

    def __init__(self, pad: int, *, apart: bool) -> None:
        self._pad, self._apart = pad, apart

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """The batch of some items."""
        width = max(len(item["input_ids"]) for item in items)
        fill = {"input_ids": self._pad, "labels": IGNORED}
        batch: dict[str, Any] = {
            name: torch.stack([_filled(item[name], width, value) for item in items])
            for name, value in fill.items()
        }
        if self._apart:
            batch["position_ids"] = torch.stack([_counted(item["position_ids"], width) for item in items])
        else:
            masks = [_filled(torch.ones_like(item["input_ids"]), width, 0) for item in items]
            batch["attention_mask"] = torch.stack(masks)
        return batch | {"use_cache": False}


def _filled(values: Tensor, width: int, value: int) -> Tensor:
    return torch.cat([values, values.new_full((width - len(values),), value)])


def _counted(positions: Tensor, width: int) -> Tensor:
    return torch.cat([positions, torch.arange(width - len(positions))])
