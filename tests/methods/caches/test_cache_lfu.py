"""What the cache lfu promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Key
from mixtura.methods.caches.lfu import Lfu


def test_the_least_used_leaves_and_of_those_the_least_recent() -> None:
    cache = Lfu(3)
    for expert in (1, 1, 2, 3):
        cache.touch(0, expert)
    assert cache.touch(0, 4).evicted == Key(0, 2)


def test_a_count_outlives_an_eviction_unless_forgotten() -> None:
    accesses = (1, 1, 1, 2, 2, 3, 2, 4)
    remembering, forgetting = Lfu(2), Lfu(2, forget=True)
    kept = [remembering.touch(0, expert).evicted for expert in accesses]
    lost = [forgetting.touch(0, expert).evicted for expert in accesses]
    # Expert 2 comes back with its count of two, or starts anew with one.
    assert kept[-2:] == [Key(0, 3), Key(0, 1)]
    assert lost[-2:] == [Key(0, 3), Key(0, 2)]
