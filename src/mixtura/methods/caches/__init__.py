"""Choosing which experts stay in memory when not all fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from mixtura.errors import check_range

KIND = {
    "base": "Cache",
    "summary": "Chooses which experts stay in memory.",
    "tags": {
        "oracle": "reads the future: it measures other caches, and no model can run with it",
        "reads:scores": "is told what a layer's router thinks of every expert (`Call.scores`)",
        "reads:trace": "is given a recorded trace before the first call (`Cache.learn`)",
    },
}


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


@final
@dataclass(frozen=True, slots=True)
class Call:
    """A layer is about to run: told once, before any of its experts is touched.

    Attributes:
        layer: number of the decoder layer.
        experts: those that are needed, ascending.
        num_rows: tokens that go to each of them.
        scores: mean share that the router gives each of all experts, where a method asks for it.
    """

    layer: int
    experts: tuple[int, ...]
    num_rows: tuple[int, ...]
    scores: tuple[float, ...] | None = None


class Cache(ABC):
    """Keeps at most ``capacity`` experts, of whichever layers, and says which leaves for a new one.

    An expert that is needed always comes in: it must be in memory to run. A method only remembers
    (`note`) and chooses (`victim`); what is inside is counted here, so that no method can keep more
    than it may.

    Raises:
        SettingError: ``capacity`` is less than 1.
    """

    def __init__(self, capacity: int) -> None:
        check_range(type(self).__name__, "capacity", capacity, 1, float("inf"))
        self.capacity = capacity
        self.inside: dict[Key, None] = {}

    @final
    def touch(self, layer: int, expert: int, held: Collection[Key] = ()) -> Touch:
        """An expert is needed now.

        Args:
            layer: number of the decoder layer.
            expert: its number in that layer.
            held: experts that must not leave now, because others of the same call still need them; fewer
                than ``capacity`` of those inside.
        """
        key = Key(layer, expert)
        hit = key in self.inside
        evicted = None
        if not hit and len(self.inside) == self.capacity:
            evicted = self.victim(key, held)
            del self.inside[evicted]
        self.inside[key] = None
        self.note(key, hit)
        return Touch(hit, evicted)

    def grow(self, more: int) -> None:
        """Have room for so many more experts from now on."""
        self.capacity += more

    def foresee(self, accesses: Sequence[Key]) -> None:
        """Be told, before the first touch, all that will be touched; only an ``oracle`` listens."""
        del accesses

    def learn(self, counts: Mapping[int, Sequence[float]]) -> None:
        """Be given, by layer, how often each of its experts was chosen in recorded text.

        Only a method with the tag ``reads:trace`` listens.
        """
        del counts

    def begin(self) -> None:
        """Be told that a new text begins."""
        return

    def see(self, call: Call) -> None:
        """Be told of a layer's call before its experts are touched."""
        del call

    @abstractmethod
    def note(self, key: Key, hit: bool) -> None:
        """Remember that an expert, now inside, was needed."""

    @abstractmethod
    def victim(self, key: Key, held: Collection[Key]) -> Key:
        """The expert inside, and not among ``held``, that leaves so that ``key`` can come in."""


def replay(cache: Cache, accesses: Sequence[Key]) -> list[Touch]:
    """Run a whole sequence of needed experts through a cache."""
    cache.foresee(accesses)
    return [cache.touch(*key) for key in accesses]
