"""Bringing experts from disk to memory when layers need them: the core of running in little memory.

Caches and prefetchers only decide; everything is read, placed and counted here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

from torch import Tensor

from mixtura.methods.caches import Call, Key
from mixtura.running.tiers.ahead import Ahead
from mixtura.running.tiers.lessons import Lesson
from mixtura.running.tiers.loads import Load
from mixtura.running.tiers.reading import LATER, Reader
from mixtura.running.tiers.recipes import Recipe
from mixtura.running.tiers.slots import Slots
from mixtura.running.tiers.statistics import Statistics

# Experts that stand in for all others of their form while it is tried how a layer can run.
_STAND_INS: Final = 2
# Tells what a layer's router thinks of each expert, from the layer's tokens.
Scores = Callable[[int, Tensor], tuple[float, ...] | None]


@final
class Tiers:
    """The experts of all layers of a model: some in slots of a fixed pool, the others on disk.

    Layers are numbered from 0 here. One pass runs at a time.

    Args:
        recipes: of each layer.
        pools: slots for each size of expert.
        reader: reads them.
        ahead: reads experts before they are needed; None for never.
        scores: asked for the caches that read scores; None where no cache does.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        pools: Sequence[Slots],
        reader: Reader,
        ahead: Ahead | None = None,
        scores: Scores | None = None,
    ) -> None:
        self.recipes = tuple(recipes)
        self.pools = tuple(pools)
        self.statistics = Statistics()
        self.ahead = ahead
        self._reader = reader
        self._scores = scores
        for pool in self.pools:
            pool.on_wasted = self._count_wasted
        # Experts lie in the slots of the smallest size that holds them.
        sizes = sorted((pool.num_bytes, number) for number, pool in enumerate(pools))
        self._pool_of = [
            [
                next(number for size, number in sizes if size >= recipe.num_bytes(expert))
                for expert in range(recipe.num_experts)
            ]
            for recipe in recipes
        ]
        self._owners = [[recipe.owner(expert) for expert in range(recipe.num_experts)] for recipe in recipes]
        # What the call that runs now may read, and what was touched for it already.
        self._current: frozenset[Key] = frozenset()
        self._touched: set[Key] = set()
        self._has_looked = False

    def pool(self, layer: int, expert: int) -> Slots:
        """The slots in which an expert finds room."""
        return self.pools[self._pool_of[layer][expert]]

    def key(self, layer: int, expert: int) -> Key:
        """What an expert is known by in slots and caches: experts that were merged are one."""
        return Key(layer, self._owners[layer][expert])

    def memory(self, layer: int, expert: int) -> Tensor:
        """Where an expert lies that was brought."""
        pool = self.pool(layer, expert)
        return pool.memory(pool.slot_of(self.key(layer, expert)))

    def is_here(self, layer: int, expert: int) -> bool:
        """Whether the call that runs now may read an expert."""
        return self.key(layer, expert) in self._current

    def begin_text(self) -> None:
        """A new text begins."""
        for pool in self.pools:
            pool.cache.begin()
        if self.ahead is not None:
            self.ahead.prefetcher.begin()

    def learn(self, lesson: Lesson) -> None:
        """Hand what a trace says to those who go by it."""
        for pool in self.pools:
            pool.cache.learn(lesson.counts)
        if self.ahead is not None:
            self.ahead.prefetcher.learn(lesson.pairs)

    @contextmanager
    def rehearsing(self, layer: int) -> Iterator[None]:
        """Let a few of a layer's experts stand in for all others that lie in memory alike.

        Trying how a layer can run needs experts, whichever they are: these few are read, not all that random
        tokens choose.
        """
        own, recipe = self._owners[layer], self.recipes[layer]
        alike: dict[object, list[int]] = {}
        made = []
        for expert in own:
            few = alike.setdefault((self._pool_of[layer][expert], recipe.form(expert)), [])
            if expert not in few and len(few) < _STAND_INS:
                few.append(expert)
            made.append(expert if expert in few else few[expert % len(few)])
        self._owners[layer] = made
        try:
            yield
        finally:
            self._owners[layer] = own

    def forget_statistics(self) -> Statistics:
        """Count anew from now on; returns what was counted."""
        counted, self.statistics = self.statistics, Statistics()
        return counted

    def announce(self, layer: int, experts: Sequence[int], num_rows: Sequence[int], x: Tensor | None) -> None:
        """A layer's call begins that needs these experts, ascending."""
        self._touched.clear()
        self._has_looked = False
        scores = None if self._scores is None or x is None else self._scores(layer, x)
        rows: Counter[int] = Counter()
        for expert, num in zip(experts, num_rows, strict=True):
            rows[self._owners[layer][expert]] += num
        needed = sorted(rows)
        call = Call(layer, tuple(needed), tuple(rows[expert] for expert in needed), scores)
        for pool in self.pools:
            pool.cache.see(call)

    def bring(
        self, layer: int, experts: Sequence[int], x: Tensor | None = None, *, in_order: int = 0
    ) -> list[int]:
        """Begin to bring all of these experts that fit, and return with those that can be multiplied.

        They are kept until the next call. Reading the others goes on meanwhile, so the caller multiplies what
        it got and asks for the rest.

        Args:
            layer: number of the layer.
            experts: those that are still needed, in the order in which they will be multiplied.
            x: the call's tokens, for whoever reads ahead.
            in_order: where they must come in their order, how many at least are worth beginning with; 0
                where those that are there go first.

        Returns:
            Places among ``experts``, ascending, at least one.

        Raises:
            CheckpointError: an expert cannot be read.
        """
        keys = [self.key(layer, expert) for expert in experts]
        num = self._num_together(keys)
        now, later = keys[:num], keys[num:]
        soon = later[: self._num_together(later)] if later else []
        if not self._fit([*now, *soon]):
            soon = []
        held = frozenset([*now, *soon])
        loads = [self._admit(key, held) for key in now]
        for key in soon:
            self._admit(key, held)
        if not later and x is not None and self.ahead is not None and not self._has_looked:
            self._has_looked = True
            self.ahead.look(self, layer, experts, x)
        come = self._first(loads, in_order) if in_order else self._those_here(loads)
        self._current = frozenset(now[place] for place in come)
        return come

    def read_ahead(self, key: Key) -> int:
        """Begin to read an expert that may be needed; returns its bytes, 0 for one that is here."""
        key = self.key(*key)
        pool, recipe = self.pool(*key), self.recipes[key.layer]
        if not pool.num_ahead or pool.holds(key):
            return 0
        slot = pool.admit_ahead(key)
        if slot is None:
            return 0
        memory = pool.memory(slot)[: recipe.num_bytes(key.expert)]
        ranges = recipe.ranges(key.expert, memory)
        if ranges is None:
            pool.drop_ahead(key)
            return 0
        load = self._reader.read(ranges, LATER)
        pool.set_load(slot, load)
        self.statistics.prefetched_bytes += load.num_bytes
        return load.num_bytes

    def stop_ahead(self) -> None:
        """Give the room for guesses to the caches."""
        for pool in self.pools:
            pool.stop_ahead()

    @property
    def wants_tokens(self) -> bool:
        """Whether anybody looks at a call's tokens."""
        return self._scores is not None or (self.ahead is not None and not self.ahead.is_off)

    def _count_wasted(self, num_bytes: int) -> None:
        self.statistics.wasted_bytes += num_bytes

    def _num_together(self, keys: Sequence[Key]) -> int:
        """How many of the first experts are brought together: all, or half of what there is room for."""
        if self._fit(keys):
            return len(keys)
        counts, seen = [0] * len(self.pools), set()
        for place, (layer, expert) in enumerate(keys):
            if (layer, expert) in seen:
                continue
            seen.add((layer, expert))
            number = self._pool_of[layer][expert]
            counts[number] += 1
            if counts[number] > max(1, self.pools[number].capacity // 2):
                return place
        return len(keys)

    def _fit(self, keys: Sequence[Key]) -> bool:
        counts = [0] * len(self.pools)
        for layer, expert in set(keys):
            counts[self._pool_of[layer][expert]] += 1
        return all(count <= pool.capacity for count, pool in zip(counts, self.pools, strict=True))

    def _admit(self, key: Key, held: frozenset[Key]) -> Load | None:
        """Make sure that an expert is in memory or on its way; returns what is still to be waited for."""
        pool, recipe, counted = self.pool(*key), self.recipes[key.layer], self.statistics
        if key in self._touched and key in pool.cache.inside:
            return self._pending(key)
        self._touched.add(key)
        place = pool.admit(key, held)
        load = pool.load_of(place.slot)
        counted.count(key.layer, place.is_hit)
        if place.was_guessed and load is not None:
            counted.used_bytes += load.num_bytes
            self._reader.hurry(load)
        if place.is_hit and (load is None or load.error is None):
            return load
        num_bytes = recipe.num_bytes(key.expert)
        counted.demanded_bytes += num_bytes
        return self._read(key, place.slot)

    def _pending(self, key: Key) -> Load | None:
        pool = self.pool(*key)
        slot = pool.slot_of(key)
        load = pool.load_of(slot)
        return self._read(key, slot) if load is not None and load.error is not None else load

    def _read(self, key: Key, slot: int) -> Load | None:
        pool, recipe = self.pool(*key), self.recipes[key.layer]
        memory = pool.memory(slot)[: recipe.num_bytes(key.expert)]
        ranges = recipe.ranges(key.expert, memory)
        if ranges is not None:
            load = self._reader.read(ranges)
            pool.set_load(slot, load)
            return load
        # Until it is there, whoever comes next must read it anew.
        pool.set_load(slot, Load.failed())
        start = time.perf_counter()
        recipe.fill(key.expert, memory)
        self.statistics.waited_ms += (time.perf_counter() - start) * 1000
        pool.set_load(slot, None)
        return None

    def _those_here(self, loads: Sequence[Load | None]) -> list[int]:
        """The places of loads that are done; where none is, of those that are when the first comes."""
        come = _done(loads)
        if not come:
            self._wait(loads[:1])
            come = _done(loads)
        return come

    def _first(self, loads: Sequence[Load | None], least: int) -> list[int]:
        """The first places, ``least`` of them or more, whose loads are done."""
        least = min(max(1, least), len(loads))
        self._wait(loads[:least])
        come = _done(loads)
        return [place for number, place in enumerate(come) if number == place]

    def _wait(self, loads: Sequence[Load | None]) -> None:
        pending = [load for load in loads if load is not None and not load.is_here]
        if not pending:
            return
        start = time.perf_counter()
        try:
            for load in pending:
                load.wait()
        finally:
            self.statistics.waited_ms += (time.perf_counter() - start) * 1000


def _done(loads: Sequence[Load | None]) -> list[int]:
    return [place for place, load in enumerate(loads) if load is None or load.is_here]
