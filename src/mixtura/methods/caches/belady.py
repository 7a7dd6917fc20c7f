"""The best possible: let go what is needed again last."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import final

from mixtura.errors import UserError
from mixtura.methods.caches import Cache, Key
from mixtura.methods.caches._shared import Queue

METHOD = {"paper": None, "title": "Belady's optimal replacement", "tags": ["oracle"]}


@final
class Belady(Cache):
    """Let go the expert whose next use is furthest off: the most hits any cache of the size can have.

    It must be told the whole future, so it is a ruler for other caches and of no use to run a model.
    Of experts never needed again, the one of lowest layer and number leaves.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1.
        UserError: what is touched is not what was foreseen.

    Example:
        >>> from mixtura.methods.caches import replay
        >>> accesses = [Key(0, expert) for expert in (1, 2, 3, 1, 2)]
        >>> [touch.hit for touch in replay(Belady(2), accesses)]
        [False, False, False, True, False]

    Reference:
        A baseline of Not All Models Suit Expert Offloading: On Local Routing Consistency
        of Mixture-of-Expert Models (paper 119).
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[Key, deque[int]] = {}
        self._clock = 0
        self._queue = Queue()

    def foresee(self, accesses: Sequence[Key]) -> None:
        for time, key in enumerate(accesses, start=self._clock):
            self._uses.setdefault(key, deque()).append(time)
        for key in self.inside:
            self._rank(key)

    def note(self, key: Key, hit: bool) -> None:
        uses = self._uses.get(key)
        if not uses or uses.popleft() != self._clock:
            raise UserError(
                f"belady was not told that expert {key.expert} of layer {key.layer} is needed at access "
                f"{self._clock}; call foresee with all accesses first, or use lru"
            )
        self._clock += 1
        self._rank(key)

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        return self._queue.pop(held)

    def _rank(self, key: Key) -> None:
        uses = self._uses[key]
        self._queue.put(key, -uses[0] if uses else -math.inf)
