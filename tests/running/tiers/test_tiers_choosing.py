"""The cache that chooses: it misses about as little as the best of its rivals, whoever that is."""

from __future__ import annotations

import random

import pytest

from mixtura.errors import UnknownNameError
from mixtura.methods import create
from mixtura.methods.caches import Cache, Call, Key
from mixtura.running.tiers.choosing import AUTO, RIVALS, Choosing, cache_of

NUM_EXPERTS, CAPACITY = 32, 12


def misses(cache: Cache, calls: list[tuple[int, ...]]) -> int:
    """How many experts of one layer's calls were not there."""
    missed = 0
    for experts in calls:
        held = frozenset(Key(0, expert) for expert in experts)
        cache.see(Call(0, experts, (1,) * len(experts)))
        missed += sum(not cache.touch(0, expert, held).hit for expert in experts)
        assert held <= cache.inside.keys()
        assert len(cache.inside) <= cache.capacity
    return missed


def favourites(drawn: random.Random, num: int) -> list[tuple[int, ...]]:
    """Calls for some experts again and again, and for any of the others once in a while: counts are best."""
    common = [tuple(sorted(drawn.sample(range(8), 2) + drawn.sample(range(8, NUM_EXPERTS), 2)))]
    return [
        tuple(sorted(drawn.sample(range(8), 2) + drawn.sample(range(8, NUM_EXPERTS), 2))) for _ in range(num)
    ] + common


def phases(drawn: random.Random, num: int) -> list[tuple[int, ...]]:
    """Calls for a few experts for a while, then for others: age is best."""
    made = []
    for _ in range(num // 20):
        some = drawn.sample(range(NUM_EXPERTS), 10)
        made += [tuple(sorted(drawn.sample(some, 4))) for _ in range(20)]
    return made


@pytest.mark.parametrize("calls_of", [favourites, phases])
def test_it_follows_the_best(calls_of: object) -> None:
    assert callable(calls_of)
    calls = calls_of(random.Random(0), 600)
    alone = {name: misses(create("caches", name, CAPACITY), calls) for name in RIVALS}
    found = misses(cache_of(AUTO, CAPACITY), calls)
    assert max(alone.values()) > 1.05 * min(alone.values()), "the rivals must differ, or nothing is tested"
    assert found < min(alone.values()) + 0.35 * (max(alone.values()) - min(alone.values()))


def test_the_lead_changes_with_the_text() -> None:
    drawn = random.Random(1)
    cache = cache_of(AUTO, CAPACITY)
    assert isinstance(cache, Choosing)
    misses(cache, favourites(drawn, 400))
    first = cache.leader
    misses(cache, phases(drawn, 800))
    assert (first, cache.leader) == ("activation_aware", "lru") or first != cache.leader


def test_room_can_grow() -> None:
    cache = cache_of(AUTO, 2)
    misses(cache, [(0,), (1,), (2,)])
    cache.grow(2)
    assert misses(cache, [(3,), (4,), (3,), (2,)]) == 2
    assert len(cache.inside) == 4


def test_a_name_that_is_none() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'lru'"):
        cache_of("lruu", 2)


def test_a_trace_brings_another_rival() -> None:
    cache = cache_of(AUTO, 4, is_taught=True)
    cache.learn({0: [0.0, 5.0]})
    assert misses(cache, [(0, 1), (0, 1)]) == 2
