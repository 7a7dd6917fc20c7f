"""What caches share to find who has the least rank, when ranks change all the time."""

from __future__ import annotations

from collections.abc import Callable, Collection
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


@final
class ByLayer:
    """Keys whose ranks change with each call of their layer, and of that layer only.

    The least of each layer is remembered until something in the layer changes, so that finding the least of
    all costs a look at every layer, not at every key. Of equal ranks the key that was used least recently
    comes first.

    Args:
        rank: of a key, from what its layer's calls have left.
    """

    def __init__(self, rank: Callable[[Key], float]) -> None:
        self._rank = rank
        self._ages: dict[int, dict[Key, int]] = {}
        self._clock = 0
        self._least: dict[int, tuple[float, int, Key]] = {}

    def use(self, key: Key) -> None:
        """A key is there and was used now."""
        self._clock += 1
        self._ages.setdefault(key.layer, {})[key] = self._clock
        self._least.pop(key.layer, None)

    def stir(self, layer: int | None = None) -> None:
        """The ranks of a layer, or of all, have changed."""
        if layer is None:
            self._least.clear()
        else:
            self._least.pop(layer, None)

    def pop(self, held: Collection[Key]) -> Key:
        """Take out the key of least rank that is not held."""
        apart = {key.layer for key in held}
        best: tuple[float, int, Key] | None = None
        for layer, ages in self._ages.items():
            least = self._least.get(layer) if layer not in apart else None
            if least is None:
                free = ages if layer not in apart else [key for key in ages if key not in held]
                least = min(((self._rank(key), ages[key], key) for key in free), default=None)
                if least is not None and layer not in apart:
                    self._least[layer] = least
            if least is not None and (best is None or least < best):
                best = least
        assert best is not None
        key = best[2]
        del self._ages[key.layer][key]
        self._least.pop(key.layer, None)
        return key
