"""What recorded text needed most stays."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods._parts import part_of
from mixtura.methods.caches import Cache, Key

METHOD = {"paper": None, "title": "Pinned by a trace", "tags": ["reads:trace"]}


@final
class Pinned(Cache):
    """Keep the experts that recorded text chose most often; the rest of the room goes by age.

    ``share`` of the room is for those of highest count in a trace (`mixtura observe`), over all layers. Once
    they are in they leave only if there is no other. It suits text like the recorded one.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1, or ``share`` not in [0, 1].

    Example:
        >>> cache = Pinned(2)
        >>> cache.learn({0: [1.0, 9.0, 2.0]})
        >>> [cache.touch(0, expert).evicted for expert in (1, 2, 0)][-1]
        Key(layer=0, expert=2)
    """

    def __init__(self, capacity: int, *, share: float = 0.75) -> None:
        super().__init__(capacity)
        check_range("Pinned", "share", share, 0.0, 1.0)
        self.share = share
        self._pinned: frozenset[Key] = frozenset()
        self._by_age: dict[Key, None] = {}

    def learn(self, counts: Mapping[int, Sequence[float]]) -> None:
        every = ((count, Key(layer, e)) for layer, row in counts.items() for e, count in enumerate(row))
        best = sorted(every, key=lambda pair: (-pair[0], pair[1]))[: part_of(self.share, self.capacity)]
        self._pinned = frozenset(key for _, key in best)

    def note(self, key: Key, hit: bool) -> None:
        self._by_age.pop(key, None)
        self._by_age[key] = None

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        free = [one for one in self._by_age if one not in held]
        leaving = next((one for one in free if one not in self._pinned), free[0])
        del self._by_age[leaving]
        return leaving
