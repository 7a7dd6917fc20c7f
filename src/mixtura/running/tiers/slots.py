"""Room for experts of one size: where each lies, and what goes when another comes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.methods.caches import Cache, Key
from mixtura.running.tiers.loads import Load

# Slots begin at pages, so that each is read to and given back by itself.
PAGE_BYTES: Final = 4096


def slot_bytes(num_bytes: int) -> int:
    """Memory that a slot for an expert of so many bytes takes."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A slot that an expert was given, and whether its bytes are there or on their way.

    Attributes:
        slot: its number.
        is_hit: the expert was in memory already.
        was_guessed: it was read ahead of its need.
    """

    slot: int
    is_hit: bool
    was_guessed: bool = False


@final
class Slots:
    """A fixed piece of memory, cut into slots of one size.

    A cache says which experts the slots hold. Beside them there are slots for experts that are read ahead:
    one that is then needed stays where it is, and the slot of the one that the cache let go for it takes
    the place of its own.

    Args:
        num_bytes: of an expert, at most.
        cache: as many slots as it has room for.
        num_ahead: slots for experts that are read ahead.
    """

    def __init__(self, num_bytes: int, cache: Cache, num_ahead: int = 0) -> None:
        self.num_bytes = num_bytes
        self.cache = cache
        self.num_ahead = num_ahead
        # Told of the bytes of guessed experts that go unused.
        self.on_wasted: Callable[[int], None] = lambda num_bytes: None
        size = slot_bytes(num_bytes)
        num_slots = cache.capacity + num_ahead
        memory = torch.empty(num_slots * size + PAGE_BYTES, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE_BYTES
        self._memory = memory[start : start + num_slots * size].view(num_slots, size)
        self._free: list[int] = [*range(num_slots)][::-1]
        self._slots: dict[Key, int] = {}
        self._ahead: dict[Key, int] = {}
        self._loads: list[Load | None] = [None] * num_slots

    @property
    def capacity(self) -> int:
        """Experts that calls can hold together."""
        return self.cache.capacity

    def memory(self, slot: int) -> Tensor:
        """The bytes of a slot."""
        return self._memory[slot]

    def holds(self, key: Key) -> bool:
        """Whether an expert is in memory or on its way there."""
        return key in self._slots or key in self._ahead

    def slot_of(self, key: Key) -> int:
        """The slot of an expert that the cache holds."""
        return self._slots[key]

    def load_of(self, slot: int) -> Load | None:
        """What is being read to a slot, or was last."""
        return self._loads[slot]

    def set_load(self, slot: int, load: Load | None) -> None:
        """Note what is being read to a slot."""
        self._loads[slot] = load

    def admit(self, key: Key, held: Collection[Key]) -> Place:
        """Give an expert that is needed now its slot; ``held`` are those that must not go for it."""
        touch = self.cache.touch(key.layer, key.expert, held)
        if touch.evicted is not None:
            self._free.append(self._slots.pop(touch.evicted))
        if touch.hit:
            return Place(self._slots[key], is_hit=True)
        guessed = self._ahead.pop(key, None)
        slot = self._take() if guessed is None else guessed
        self._slots[key] = slot
        return Place(slot, is_hit=guessed is not None, was_guessed=guessed is not None)

    def admit_ahead(self, key: Key) -> int | None:
        """A slot for an expert that may be needed soon; None where all are being read to."""
        if len(self._ahead) >= self.num_ahead:
            oldest = next(iter(self._ahead))
            load = self._loads[self._ahead[oldest]]
            if load is not None and not load.is_done:
                return None
            self.on_wasted(0 if load is None else load.num_bytes)
            self.drop_ahead(oldest)
        self._ahead[key] = self._take()
        return self._ahead[key]

    def drop_ahead(self, key: Key) -> None:
        """Give up an expert that was guessed."""
        self._free.append(self._ahead.pop(key))

    def stop_ahead(self) -> None:
        """Give the slots for guesses to the cache; what is in them is wasted."""
        for key in [*self._ahead]:
            load = self._loads[self._ahead[key]]
            self.on_wasted(0 if load is None else load.num_bytes)
            self.drop_ahead(key)
        self.cache.grow(self.num_ahead)
        self.num_ahead = 0

    def _take(self) -> int:
        slot = self._free.pop()
        load = self._loads[slot]
        if load is not None and not load.is_done:
            # Whoever wanted what was to come here has failed; it must not come any more.
            load.give_up(CheckpointError("nobody waits for it any more"))
        self._loads[slot] = None
        return slot
