"""A queue that caches share: who has the least rank, when ranks change all the time."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush
from typing import final

from mixtura.methods.caches import Key


@final
class Queue:
    """Keys by rank, least first; of equal ranks the lowest key.

    A changed rank leaves the old entry in the heap, to be passed over when it comes up; the heap is
    made anew before such entries are many.
    """

    def __init__(self) -> None:
        self._ranks: dict[Key, tuple[float, ...]] = {}
        self._heap: list[tuple[tuple[float, ...], Key]] = []

    def put(self, key: Key, *rank: float) -> None:
        """Enter a key, or give it another rank."""
        self._ranks[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 4 * len(self._ranks) + 16:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapify(self._heap)

    def pop(self, held: Collection[Key] = ()) -> Key:
        """Take out the key of least rank that is not held."""
        aside = []
        while True:
            rank, key = heappop(self._heap)
            if self._ranks.get(key) != rank:
                continue
            if key not in held:
                break
            aside.append((rank, key))
        for entry in aside:
            heappush(self._heap, entry)
        del self._ranks[key]
        return key
