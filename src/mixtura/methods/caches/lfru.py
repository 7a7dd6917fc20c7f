"""Least frequently used behind a part that is least recently used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import final

from mixtura.errors import check_range
from mixtura.methods._parts import part_of
from mixtura.methods.caches import Cache, Key

METHOD = {"paper": None, "title": "Least frequent behind least recent (LFRU)"}


@final
class Lfru(Cache):
    """Keep what was needed again for as long as it is recent, and of the rest what is needed most often.

    An expert comes into the common part. One that is needed again there moves to the privileged part, which
    has ``share`` of the room; what has not been needed for longest falls back from it to the common part.
    Whoever has been needed least often leaves the common part, of those the least recent.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1, or ``share`` not in [0, 1].

    Example:
        >>> cache = Lfru(3)
        >>> [cache.touch(0, expert).evicted for expert in (1, 1, 2, 3, 4)][-1]
        Key(layer=0, expert=2)
    """

    def __init__(self, capacity: int, *, share: float = 0.5) -> None:
        super().__init__(capacity)
        check_range("Lfru", "share", share, 0.0, 1.0)
        self.share = share
        self._counts: Counter[Key] = Counter()
        self._common: dict[Key, None] = {}
        self._privileged: dict[Key, None] = {}

    def note(self, key: Key, hit: bool) -> None:
        self._counts[key] = self._counts[key] + 1 if hit else 1
        self._common.pop(key, None)
        self._privileged.pop(key, None)
        if not hit:
            self._common[key] = None
            return
        self._privileged[key] = None
        if len(self._privileged) > part_of(self.share, self.capacity):
            oldest = next(iter(self._privileged))
            del self._privileged[oldest]
            self._common[oldest] = None

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        free = [one for one in self._common if one not in held]
        # Of equal counts the first of a dict in order of use.
        leaving = min(free, key=lambda one: self._counts[one]) if free else None
        if leaving is None:
            leaving = next(one for one in self._privileged if one not in held)
        self._common.pop(leaving, None)
        self._privileged.pop(leaving, None)
        return leaving
