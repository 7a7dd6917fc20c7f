"""Beginnings of texts that were read before, and the memory that they and running texts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from transformers import PreTrainedModel

from mixtura.running.generation import reserved_cache
from mixtura.serving.engine.caches import CacheCost, beginning_of, holds_all, shorten, trim
from mixtura.serving.engine.lanes import Lane

# A beginning of fewer tokens is read again: copying its cache costs more than it saves.
LEAST_SHARED: Final = 16


@final
@dataclass(eq=False, slots=True)
class Entry:
    """A text that was read: its tokens, and their keys and values, which adapters and decoders change."""

    read_as: tuple[str | None, str]
    ids: np.ndarray[Any, np.dtype[np.int64]]
    cache: Any
    num_bytes: int
    is_whole: bool
    rank: int = field(default=0)


@final
class Prefixes:
    """Memory for caches: reserved by running texts, and what is left filled with beginnings read before.

    A running text's memory is set apart for all that it may come to before it starts, so nothing that runs
    can run out. Beginnings go, the longest unused first, when a text needs their memory.

    Args:
        model: makes the caches.
        cost: what texts take.
        limit_bytes: for running texts and beginnings together.
        keeps: whether beginnings are kept at all.
    """

    def __init__(
        self, model: PreTrainedModel, cost: CacheCost, limit_bytes: int, *, keeps: bool = True
    ) -> None:
        self.cost = cost
        self.limit_bytes = limit_bytes
        self.running_bytes = 0
        self._model = model
        self._keeps = keeps
        self._entries: list[Entry] = []
        self._rank = 0

    @property
    def kept_bytes(self) -> int:
        """Memory of beginnings."""
        return sum(entry.num_bytes for entry in self._entries)

    @property
    def num_kept(self) -> int:
        """How many beginnings there are."""
        return len(self._entries)

    def admit(self, rows: Sequence[Lane], running: Sequence[Lane]) -> bool:
        """Set memory apart for all ways to read a text, and give them what was read before.

        Returns:
            False for no room now.
        """
        if self.running_bytes + sum(self.cost.of(row.room) for row in rows) > self.limit_bytes:
            return False
        for row in rows:
            self._admit(row, running)
        return True

    def _admit(self, row: Lane, running: Sequence[Lane]) -> None:
        needed = self.cost.of(row.room)
        entry, shared = self._best(row) if self._may_share(row) else (None, 0)
        other, more = self._best_running(row, running) if self._may_share(row) else (None, 0)
        if other is not None and more > shared:
            entry, shared = None, 0
        spares = self._spares(needed, entry)
        self._make_room(needed, entry)
        self.running_bytes += needed
        row.reserved_bytes = needed
        if entry is not None and shared:
            self._touch(entry)
            if not spares:
                self._drop(entry)
            row.cache = beginning_of(self._model, entry.cache, shared, row.room, consume=not spares)
            row.num_read = shared
        elif other is not None:
            row.cache, row.num_read = beginning_of(self._model, other.cache, more, row.room), more
        if row.cache is None:
            row.cache, row.num_read = reserved_cache(self._model, row.room), 0
        row.num_cached = row.num_read

    def release(self, row: Lane) -> None:
        """A row has ended: its memory is free, but for what is kept of it."""
        self.running_bytes -= row.reserved_bytes
        row.reserved_bytes = 0
        cache, row.cache = row.cache, None
        num = row.num_alike
        if not getattr(cache, "layers", None) or not self._keeps or num < LEAST_SHARED:
            return
        whole = holds_all(cache, row.num_read)
        if not whole and (row.num_read < row.num_prompt or num < row.num_read):
            return
        num_bytes = self.cost.of(num)
        if num_bytes > self.limit_bytes - self.running_bytes:
            return
        if num < row.num_read:
            shorten(cache, num)
        ids = np.array(row.ids[:num], dtype=np.int64)
        own = [one for one in self._entries if one.read_as == row.read_as]
        for entry in [one for one in own if one.is_whole <= whole and _begins(ids, one.ids)]:
            self._drop(entry)
        self._make_room(num_bytes, None)
        trim(cache, num)
        entry = Entry(row.read_as, ids, cache, num_bytes, whole)
        self._entries.append(entry)
        self._touch(entry)

    def clear(self) -> None:
        """Forget every beginning."""
        self._entries.clear()

    def _may_share(self, row: Lane) -> bool:
        # Whoever wants log-probabilities of the prompt needs all of it read.
        return self._keeps and not row.asked.reads_prompt

    def _spares(self, needed: int, entry: Entry | None) -> bool:
        """Whether a beginning can stay when a row that goes on from it comes."""
        own = 0 if entry is None else entry.num_bytes
        return self.running_bytes + needed + own <= self.limit_bytes

    def _best(self, row: Lane) -> tuple[Entry | None, int]:
        """The beginning that shares most with a row's prompt; at least one token is left to be read."""
        best: tuple[Entry | None, int] = None, 0
        ids = np.array(row.ids[: row.num_prompt - 1], dtype=np.int64)
        for entry in self._entries:
            if entry.read_as != row.read_as:
                continue
            shared = _shared(ids, entry.ids)
            if not entry.is_whole and shared < len(entry.ids):
                continue
            if shared >= LEAST_SHARED and shared > best[1]:
                best = entry, shared
        return best

    def _best_running(self, row: Lane, running: Sequence[Lane]) -> tuple[Lane | None, int]:
        best: tuple[Lane | None, int] = None, 0
        ids = np.array(row.ids[: row.num_prompt - 1], dtype=np.int64)
        for other in running:
            if other.read_as != row.read_as:
                continue
            shared = _shared(ids, np.array(other.ids[: other.num_alike], dtype=np.int64))
            if shared >= LEAST_SHARED and shared > best[1] and holds_all(other.cache, other.num_read):
                best = other, shared
        return best

    def _make_room(self, needed: int, but: Entry | None) -> None:
        for entry in sorted(self._entries, key=lambda one: one.rank):
            if self.running_bytes + self.kept_bytes + needed <= self.limit_bytes:
                return
            if entry is not but:
                self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        self._entries.remove(entry)

    def _touch(self, entry: Entry) -> None:
        self._rank += 1
        entry.rank = self._rank


def _shared(ids: np.ndarray[Any, np.dtype[np.int64]], others: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(ids), len(others))
    differs = ids[:size] != others[:size]
    return int(differs.argmax()) if differs.any() else size


def _begins(ids: np.ndarray[Any, np.dtype[np.int64]], others: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
    """Whether a text begins with all of another."""
    return len(others) <= len(ids) and _shared(ids, others) == len(others)
