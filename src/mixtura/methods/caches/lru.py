"""Least recently used."""

from __future__ import annotations

from collections.abc import Collection
from typing import final

from mixtura.methods.caches import Cache, Key

METHOD = {"paper": None, "title": "Least recently used"}


@final
class Lru(Cache):
    """Let go the expert that has not been needed for longest.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1.

    Example:
        >>> cache = Lru(2)
        >>> [cache.touch(0, expert).hit for expert in (1, 2, 1, 3, 1, 2)]
        [False, False, True, False, True, False]

    Reference:
        A baseline of Not All Models Suit Expert Offloading: On Local Routing Consistency
        of Mixture-of-Expert Models (paper 119).
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._by_age: dict[Key, None] = {}

    def note(self, key: Key, hit: bool) -> None:
        self._by_age.pop(key, None)
        self._by_age[key] = None

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        oldest = next(one for one in self._by_age if one not in held)
        del self._by_age[oldest]
        return oldest
