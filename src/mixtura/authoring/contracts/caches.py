"""What every cache promises."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.errors import SettingError
from mixtura.methods import load_method
from mixtura.methods.caches import Cache, Key, Touch, replay

_CAPACITY = 6
_CAPACITIES = (1, 2, 6, 12)
_NUM_LAYERS, _NUM_EXPERTS = 2, 8


def arguments() -> tuple[int]:
    """Room for experts."""
    return (_CAPACITY,)


def sample(method: Subject, seed: int, length: int = 300) -> list[Key]:
    """Accesses to the experts of two layers, some much more often than others, in shifting order."""
    del method
    generator = torch.Generator().manual_seed(seed)
    popular = 1 / torch.arange(1.0, _NUM_EXPERTS + 1)
    keys = []
    for step in range(length):
        if step % 100 == 0:
            order = torch.randperm(_NUM_EXPERTS, generator=generator)
        drawn = torch.multinomial(popular, 1, generator=generator).item()
        keys.append(Key(step % _NUM_LAYERS, int(order[int(drawn)])))
    return keys


def use(cache: Cache, accesses: list[Key]) -> list[Touch]:
    """What happened at each access, after a lesson: the first experts of each layer were chosen most."""
    cache.learn({layer: [1.0 / (1 + e) for e in range(_NUM_EXPERTS)] for layer in range(_NUM_LAYERS)})
    return replay(cache, accesses)


def check_contents_follow_the_touches(method: Subject) -> None:
    """Hits are what is inside, what leaves was inside, and never more is inside than fits."""
    for capacity in _CAPACITIES:
        accesses = sample(method, 10)
        cache = _sized(method, capacity)
        inside: set[Key] = set()
        for key, touch in zip(accesses, use(cache, accesses), strict=True):
            require(touch.hit == (key in inside), f"{key} is called a {'hit' if touch.hit else 'miss'}")
            if touch.evicted is not None:
                require(touch.evicted in inside, f"{touch.evicted} is evicted, but was not inside")
                require(touch.evicted != key, f"{key} is evicted to make room for itself")
                inside.remove(touch.evicted)
            inside.add(key)
            require(len(inside) <= capacity, f"{len(inside)} experts are inside a cache of {capacity}")
        require(inside == set(cache.inside), "the cache's contents are not what its touches say")


def check_evicts_only_for_room(method: Subject) -> None:
    """Nothing leaves on a hit, or while there is room."""
    for capacity in _CAPACITIES:
        accesses = sample(method, 11)
        count = 0
        for touch in use(_sized(method, capacity), accesses):
            full = count == capacity
            require(touch.evicted is None or (full and not touch.hit), "an expert leaves without need")
            count += not touch.hit and touch.evicted is None


def check_never_beats_the_best(method: Subject) -> None:
    """No cache that brings in only what is needed has more hits than `belady`."""
    best = load_method("caches", "belady")
    for capacity in _CAPACITIES:
        accesses = sample(method, 12)
        hits = sum(touch.hit for touch in use(_sized(method, capacity), accesses))
        most = sum(touch.hit for touch in replay(best(capacity), accesses))
        require(hits <= most, f"{hits} hits with room for {capacity}, where {most} are possible")


def check_enough_room_misses_once(method: Subject) -> None:
    """With room for every expert each is missed once."""
    accesses = sample(method, 13)
    touches = use(_sized(method, _NUM_LAYERS * _NUM_EXPERTS), accesses)
    misses = sum(not touch.hit for touch in touches)
    require(misses == len(set(accesses)), f"{misses} misses for {len(set(accesses))} experts")


def check_a_repeated_expert_stays(method: Subject) -> None:
    """An expert needed twice in a row is there the second time."""
    accesses = [key for key in sample(method, 14, 100) for _ in range(2)]
    for capacity in _CAPACITIES:
        touches = use(_sized(method, capacity), accesses)
        require(all(touch.hit for touch in touches[1::2]), f"an expert is gone at once (room for {capacity})")


def check_what_is_held_stays(method: Subject) -> None:
    """An expert that others of the same call still need does not leave."""
    if "oracle" in method.header.tags:
        return
    for capacity in (3, _CAPACITY):
        accesses, cache = sample(method, 15), _sized(method, capacity)
        # As many together as fit, as a layer touches them.
        for start in range(0, len(accesses), capacity):
            together = [*dict.fromkeys(accesses[start : start + capacity])]
            for key in together:
                evicted = cache.touch(*key, held=frozenset(together)).evicted
                require(evicted not in together, f"{evicted} leaves while {key} comes in beside it")
            require(set(together) <= set(cache.inside), "experts of one call are not inside together")


def check_no_room_is_refused(method: Subject) -> None:
    """A capacity below 1 raises `SettingError`."""
    for capacity in (0, -1):
        try:
            _sized(method, capacity)
        except SettingError:
            continue
        require(False, f"a capacity of {capacity} is accepted")


def _sized(method: Subject, capacity: int) -> Cache:
    cache: Cache = method.cls(capacity)
    return cache
