"""The cache that is chosen while a model runs: whichever of some would have missed least of late."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, final

from mixtura.methods import create
from mixtura.methods.caches import Cache, Call, Key

AUTO: Final = "auto"
# Those that race: what the arena of caches puts in front and what asks nothing of anybody. The first one
# leads until another has missed less.
RIVALS: Final = ("activation_aware", "lru", "lfu")
# Of a trace, where there is one.
_TAUGHT: Final = "pinned"
# Another must have missed this much less, and must have been watched over so many times the capacity.
_MARGIN: Final = 0.98
_WATCHED: Final = 2


def cache_of(name: str, capacity: int, *, is_taught: bool = False) -> Cache:
    """A cache by its name, or the one that chooses.

    Args:
        name: of a method, or `AUTO`.
        capacity: experts that it has room for.
        is_taught: whether it will be given a trace.

    Raises:
        UnknownNameError: there is no such cache.
    """
    if name != AUTO:
        cache: Cache = create("caches", name, capacity)
        return cache
    names = (*RIVALS, _TAUGHT) if is_taught else RIVALS
    return Choosing(capacity, {one: create("caches", one, capacity) for one in names})


@final
class Choosing(Cache):
    """Keeps what the best of several caches would keep.

    Each rival runs along on everything that is needed, as if it were alone; only its misses are counted, the
    recent ones more than the old ones. Whoever has missed least leads: an expert leaves that the leader would
    not have any more, the one that was needed least recently. So the room comes to hold what the leader
    would, by and by after the lead has changed, and nothing is read for the change itself.

    Args:
        capacity: experts that it has room for.
        rivals: caches of the same capacity, by name; the first leads at the beginning.

    Example:
        >>> cache = Choosing(2, {name: create("caches", name, 2) for name in ("lru", "lfu")})
        >>> [cache.touch(0, expert).hit for expert in (1, 2, 1, 3, 1, 2)]
        [False, False, True, False, True, False]
        >>> cache.leader
        'lru'
    """

    def __init__(self, capacity: int, rivals: Mapping[str, Cache]) -> None:
        super().__init__(capacity)
        self.leader = next(iter(rivals))
        self._rivals = dict(rivals)
        self._misses = dict.fromkeys(rivals, 0.0)
        self._keeps = 1 - 1 / (4 * capacity)
        self._num_told = 0
        self._told: Key | None = None
        self._held: frozenset[Key] = frozenset()
        self._by_age: dict[Key, None] = {}

    def grow(self, more: int) -> None:
        super().grow(more)
        for rival in self._rivals.values():
            rival.grow(more)

    def learn(self, counts: Mapping[int, Sequence[float]]) -> None:
        for rival in self._rivals.values():
            rival.learn(counts)

    def begin(self) -> None:
        for rival in self._rivals.values():
            rival.begin()

    def see(self, call: Call) -> None:
        held = [Key(call.layer, expert) for expert in call.experts]
        # Caches that are smaller than a call hold nothing together; they are asked one by one.
        self._held = frozenset(held if len(held) < self.capacity else [])
        for rival in self._rivals.values():
            rival.see(call)

    def note(self, key: Key, hit: bool) -> None:
        if self._told != key:
            self._tell(key)
        self._told = None
        self._by_age.pop(key, None)
        self._by_age[key] = None

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        self._tell(key)
        self._told = key
        wanted = self._rivals[self.leader].inside
        free = (one for one in self._by_age if one not in held)
        leaving = next((one for one in free if one not in wanted), None)
        if leaving is None:
            # What the leader would rather not have is still needed by this call.
            leaving = next(one for one in self._by_age if one not in held)
        del self._by_age[leaving]
        return leaving

    def _tell(self, key: Key) -> None:
        held = self._held if key in self._held else frozenset()
        for name, rival in self._rivals.items():
            missed = not rival.touch(*key, held).hit
            self._misses[name] = self._keeps * self._misses[name] + missed
        self._num_told += 1
        if self._num_told < _WATCHED * self.capacity:
            return
        best = min(self._misses, key=lambda name: self._misses[name])
        if self._misses[best] < _MARGIN * self._misses[self.leader]:
            self.leader = best
