"""Shallow layers first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import final

from mixtura.errors import check_range
from mixtura.methods._parts import part_of
from mixtura.methods.caches import Cache, Key

METHOD = {
    "paper": 206,
    "title": "Accurate Expert Predictions in MoE Inference via Cross-Layer Gate",
}


@final
class Shallow(Cache):
    """Keep the experts of the first layers, and of the others those that are recent.

    What a prefetcher guesses from one layer for the next is least right in the first layers, and for the very
    first there is nothing to guess from. So ``share`` of the room belongs to the shallowest layers whose
    experts fit in it; the rest goes by what has not been needed for longest.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1, or ``share`` not in [0, 1].

    Example:
        >>> cache = Shallow(4)
        >>> keys = [Key(0, 1), Key(0, 2), Key(1, 1), Key(1, 2), Key(2, 1)]
        >>> [cache.touch(*key).evicted for key in keys][-1]
        Key(layer=1, expert=1)

    Differences from the paper:
        Only its abstract and summaries of it were read: they say that shallow layers are favoured and that an
        adaptive replacement cache (ARC) decides the rest, which is least recently used here. The share is
        ours; 0 makes it the cache ``lru``.

    Reference:
        Accurate Expert Predictions in MoE Inference via Cross-Layer Gate (paper 206).
    """

    def __init__(self, capacity: int, *, share: float = 0.5) -> None:
        super().__init__(capacity)
        check_range("Shallow", "share", share, 0.0, 1.0)
        self.share = share
        self._by_age: dict[Key, None] = {}
        self._counts: Counter[int] = Counter()

    def note(self, key: Key, hit: bool) -> None:
        self._counts[key.layer] += key not in self._by_age
        self._by_age.pop(key, None)
        self._by_age[key] = None

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        first = self._first_unprotected()
        leaving = next((one for one in self._by_age if one.layer >= first and one not in held), None)
        if leaving is None:
            leaving = next(one for one in self._by_age if one not in held)
        del self._by_age[leaving]
        self._counts[leaving.layer] -= 1
        return leaving

    def _first_unprotected(self) -> int:
        """The first layer whose experts, with those before them, are more than the share; else the last."""
        room, held = part_of(self.share, self.capacity), sorted(+self._counts)
        for layer in held:
            room -= self._counts[layer]
            if room < 0:
                return layer
        return held[-1]
