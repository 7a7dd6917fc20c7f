"""Reading experts ahead of their need, for as long as that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, final, runtime_checkable

from torch import Tensor

from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight
from mixtura.running.tiers.statistics import Statistics

Gates = Callable[[int, Tensor], tuple[float, ...] | None]
# Tokens of a call from which nothing is guessed: it needs most experts of every layer anyway.
_MOST_TOKENS: Final = 16
# Bytes that are read ahead before it is judged, in experts, and the share of them that must have been needed.
_JUDGED_EXPERTS: Final = 64
LEAST_SHARE: Final = 0.5
_LEAST_SLOTS: Final = 2
# Of the slots, one of so many is for guesses: what they take from the cache must be little beside it, since a
# disk that is busy has little time for guesses.
_ROOM_SHARE: Final = 16


def room_for_guesses(num_slots: int, num_experts: int, top_k: int) -> int:
    """How many of some slots are for experts that are read ahead; none where all experts fit.

    Args:
        num_slots: of one size.
        num_experts: that they are for.
        top_k: experts that a layer needs for a token.
    """
    if num_slots >= num_experts or num_slots < 2 * _LEAST_SLOTS:
        return 0
    return min(top_k, max(1, num_slots // _ROOM_SHARE))


@runtime_checkable
class ReadsAhead(Protocol):
    """What reads experts for a guess."""

    statistics: Statistics

    def read_ahead(self, key: Key) -> int:
        """Begin to read an expert; returns the bytes that takes, 0 for one that is here."""
        ...

    def stop_ahead(self) -> None:
        """Nothing more will be guessed: the room for it is the cache's from now on."""
        ...


@final
class Ahead:
    """Asks a prefetcher and reads what it says, until what was read turns out not to be needed.

    The disk is what everything waits for: a byte that is read in vain delays one that is needed. So a
    prefetcher is judged by what it has read: of the bytes that have left the room for guesses, at least
    half must have been needed, else it is asked no more (``is_off``).

    Args:
        prefetcher: what is asked.
        num_experts: of every layer.
        most: experts to read ahead for one call.
        gates: what a layer's router thinks of some tokens.
    """

    def __init__(self, prefetcher: Prefetcher, num_experts: Sequence[int], most: int, gates: Gates) -> None:
        self.prefetcher = prefetcher
        self.is_off = False
        self._num_experts = tuple(num_experts)
        self._most = most
        self._gates = gates
        self._judged = 0

    def look(self, reads: ReadsAhead, layer: int, experts: Sequence[int], x: Tensor) -> None:
        """A layer's experts are there: read those that are guessed to be next."""
        if self.is_off or x.shape[0] > _MOST_TOKENS:
            return
        needed = tuple(sorted(experts))
        sight = Sight(layer, needed, self._num_experts, lambda later: self._gates(later, x), x)
        begun = 0
        for key in self.prefetcher.guess(sight):
            if begun >= self._most:
                break
            begun += reads.read_ahead(key) > 0
        self._judged += begun
        counted = reads.statistics
        gone = counted.used_bytes + counted.wasted_bytes
        if self._judged >= _JUDGED_EXPERTS and counted.used_bytes < LEAST_SHARE * gone:
            self.is_off = True
            reads.stop_ahead()
