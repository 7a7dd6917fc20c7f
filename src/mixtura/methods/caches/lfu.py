"""Least frequently used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import final

from mixtura.methods.caches import Cache, Key
from mixtura.methods.caches._shared import Queue

METHOD = {"paper": None, "title": "Least frequently used"}


@final
class Lfu(Cache):
    """Let go the expert that has been needed least often; of those, the least recent.

    With ``forget`` an expert's count starts anew each time it comes in; without, it is kept for
    good, which suits a text that does not change its subject.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1.

    Example:
        >>> cache = Lfu(2)
        >>> [cache.touch(0, expert).hit for expert in (1, 1, 2, 3, 1, 2)]
        [False, True, False, False, True, False]

    Reference:
        A baseline of Not All Models Suit Expert Offloading: On Local Routing Consistency
        of Mixture-of-Expert Models (paper 119).
    """

    def __init__(self, capacity: int, *, forget: bool = False) -> None:
        super().__init__(capacity)
        self.forget = forget
        self._counts: Counter[Key] = Counter()
        self._clock = 0
        self._queue = Queue()

    def note(self, key: Key, hit: bool) -> None:
        if self.forget and not hit:
            self._counts[key] = 0
        self._counts[key] += 1
        self._clock += 1
        self._queue.put(key, self._counts[key], self._clock)

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        return self._queue.pop(held)
