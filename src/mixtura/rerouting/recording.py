"""Writing down what was chosen for each sequence, pass by pass, also where passes go on from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixtura.errors import UserError
from mixtura.rerouting.passes import Pass
from mixtura.types import Routing

_FROM_THE_FIRST = "record from the first token on"
# What moves sequences between the rows of a cache.
_MOVING = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
_SHORTENING = ("crop",)


@final
@dataclass(slots=True)
class Batch:
    """The sequences that a cache holds.

    Attributes:
        places: of each row, the number of its sequence in the recording; None where several are packed.
        valid: False for padding, of every column so far.
    """

    places: list[int] | None
    valid: Bool[Tensor, "R C"]


@final
class Recorder:
    """Listens to a model's passes and adds to the lists it was given; see `record_routing`."""

    def __init__(self, tokens: list[Tensor], choices: list[dict[int, Tensor]]) -> None:
        self._tokens = tokens
        self._choices = choices
        self._batches: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def before(self, here: Pass) -> None:
        """Ask for what routers return.

        Raises:
            UserError: the pass goes on from tokens that were not recorded.
        """
        require_tokens(here, "recorded")
        here.collecting = True
        if here.past:
            self._held(here)

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """Keep each sequence's tokens and choices."""
        assert here.shape is not None
        assert here.valid is not None
        assert here.token_ids is not None
        sequences = sequences_of(here)
        batch = self._held(here) if here.past else self._begun(here, len(sequences))
        rows, columns = here.shape
        if here.past:
            batch.valid = torch.cat([batch.valid, here.valid.view(rows, columns).cpu()], dim=1)
        first = len(self._tokens) - len(sequences)
        places = list(range(first, len(self._tokens))) if batch.places is None else batch.places
        for place, where in zip(places, sequences, strict=True):
            kept = here.token_ids[where].to("cpu", torch.int32)
            self._tokens[place] = torch.cat([self._tokens[place], kept])
        for index, seen in here.seen.items():
            assert seen.expert_ids is not None
            chosen = seen.expert_ids.detach().flatten(0, -2)
            if len(chosen) != rows * columns:
                raise UserError(
                    f"layer {index} routed {len(chosen)} rows for {rows * columns} tokens, so its choices "
                    "cannot be told apart by token; this family's routing cannot be recorded"
                )
            for place, where in zip(places, sequences, strict=True):
                kept, layers = chosen[where].to("cpu", torch.int32), self._choices[place]
                layers[index] = torch.cat([layers[index], kept]) if index in layers else kept
        return None

    def finish_step(self) -> None:
        """Nothing to do."""

    def leave(self) -> None:
        """Let go of the caches that were watched."""
        for cache in list(self._batches):
            for name in (*_MOVING, *_SHORTENING):
                vars(cache).pop(name, None)
        self._batches.clear()

    def _begun(self, here: Pass, num_sequences: int) -> Batch:
        """The sequences of a pass that begins some; its cache is watched from now on."""
        assert here.shape is not None
        assert here.valid is not None
        first = len(self._tokens)
        self._tokens += [torch.empty(0, dtype=torch.int32) for _ in range(num_sequences)]
        self._choices += [{} for _ in range(num_sequences)]
        places = list(range(first, first + num_sequences)) if num_sequences == here.shape[0] else None
        batch = Batch(places, here.valid.view(here.shape).cpu())
        if here.cache is not None:
            self._watch(here.cache, batch)
        return batch

    def _held(self, here: Pass) -> Batch:
        """The sequences that a pass goes on with."""
        assert here.shape is not None
        batch = None if here.cache is None else self._batches.get(here.cache)
        if not isinstance(batch, Batch):
            raise UserError(f"the model goes on from a cache that was not recorded; {_FROM_THE_FIRST}")
        if batch.places is None:
            raise UserError("the model goes on from a cache of packed rows; generate from sequences in rows")
        rows, recorded = batch.valid.shape
        if here.shape[0] != rows:
            raise UserError(
                f"{here.shape[0]} rows go on from a cache of which {rows} were recorded; {_FROM_THE_FIRST}"
            )
        if here.past > recorded:
            raise UserError(
                f"the model goes on from a cache of {here.past} tokens, of which {recorded} were recorded; "
                f"{_FROM_THE_FIRST}"
            )
        self._shorten(batch, here.past)
        return batch

    def _shorten(self, batch: Batch, columns: int) -> None:
        """Forget the columns after the first so many."""
        if columns >= batch.valid.shape[1]:
            return
        batch.valid = batch.valid[:, :columns]
        for place, count in zip(batch.places or [], batch.valid.sum(1).tolist(), strict=bool(batch.places)):
            self._tokens[place] = self._tokens[place][:count]
            layers = self._choices[place]
            layers |= {index: chosen[:count] for index, chosen in layers.items()}

    def _watch(self, cache: Any, batch: Batch) -> None:
        self._batches[cache] = batch

        def moved(of: Any) -> None:
            raise UserError(
                "beam search moves sequences between rows of the cache, so that choices cannot be told apart "
                "by row; draw samples instead while routing is recorded"
            )

        def shortened(of: Any) -> None:
            self._shorten(batch, int(of.get_seq_length()))

        for name in _MOVING:
            if hasattr(cache, name):
                setattr(cache, name, _Told(cache, name, moved))
        for name in _SHORTENING:
            if hasattr(cache, name):
                setattr(cache, name, _Told(cache, name, shortened))


@final
class _Told:
    """A method of a cache that tells what it has done; a copy of the cache has the method alone."""

    def __init__(self, cache: Any, name: str, tell: Callable[[Any], None]) -> None:
        self._cache = cache
        self._name = name
        self._tell = tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self._cache), self._name)(self._cache, *args, **kwargs)
        self._tell(self._cache)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(getattr(type(self._cache), self._name), memo[id(self._cache)])


def sequences_of(here: Pass) -> list[Int[Tensor, " n"]]:
    """Where the tokens of each sequence of a batch are, padding left out, in order."""
    assert here.valid is not None
    assert here.sequence_ids is not None
    order = here.valid.nonzero().squeeze(-1)
    lengths = torch.bincount(here.sequence_ids[order], minlength=int(here.sequence_ids[-1]) + 1)
    return list(order.split(lengths.tolist()))


def require_tokens(here: Pass, done: str) -> None:
    """Refuse a pass whose text is not known.

    Raises:
        UserError: the model was given no token ids.
    """
    if here.token_ids is None:
        raise UserError(
            f"routing is {done} by token ids, and the model was given none; call it with input_ids"
        )
