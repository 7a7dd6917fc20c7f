"""Choosing which experts stay in memory when not all fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from mixtura.errors import check_range

KIND = {"base": "Cache", "summary": "Chooses which experts stay in memory."}


class Key(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int


@final
@dataclass(frozen=True, slots=True)
class Touch:
    """What happened when an expert was needed: whether it was there, and what left to make room."""

    hit: bool
    evicted: Key | None = None


class Cache(ABC):
    """Keeps at most ``capacity`` experts, of whichever layers, and says which leaves for a new one.

    An expert that is needed always comes in: it must be in memory to run. A method only remembers
    (`note`) and chooses (`victim`); what is inside is counted here, so that no method can keep more
    than it may. The tag ``oracle`` marks a method that reads the future.

    Raises:
        SettingError: ``capacity`` is less than 1.
    """

    def __init__(self, capacity: int) -> None:
        check_range(type(self).__name__, "capacity", capacity, 1, float("inf"))
        self.capacity = capacity
        self.inside: dict[Key, None] = {}

    @final
    def touch(self, layer: int, expert: int) -> Touch:
        """An expert is needed now."""
        key = Key(layer, expert)
        hit = key in self.inside
        evicted = None
        if not hit and len(self.inside) == self.capacity:
            evicted = self.victim(key)
            del self.inside[evicted]
        self.inside[key] = None
        self.note(key, hit)
        return Touch(hit, evicted)

    def foresee(self, accesses: Sequence[Key]) -> None:
        """Be told, before the first touch, all that will be touched; only an ``oracle`` listens."""
        del accesses

    @abstractmethod
    def note(self, key: Key, hit: bool) -> None:
        """Remember that an expert, now inside, was needed."""

    @abstractmethod
    def victim(self, key: Key) -> Key:
        """The expert inside that leaves so that ``key`` can come in."""


def replay(cache: Cache, accesses: Sequence[Key]) -> list[Touch]:
    """Run a whole sequence of needed experts through a cache."""
    cache.foresee(accesses)
    return [cache.touch(*key) for key in accesses]
