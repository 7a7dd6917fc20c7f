"""What the cache lru promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.caches import Key, replay
from mixtura.methods.caches.lru import Lru


def test_evicts_in_order_of_last_use() -> None:
    cache = Lru(3)
    order = [cache.touch(0, expert).evicted for expert in (1, 2, 3, 1, 4, 5, 1, 6)]
    assert order == [None, None, None, None, Key(0, 2), Key(0, 3), None, Key(0, 4)]


def test_the_same_expert_of_two_layers_is_two() -> None:
    cache = Lru(2)
    assert [cache.touch(layer, 7).hit for layer in (0, 1, 0, 1)] == [False, False, True, True]


def test_a_larger_cache_never_has_fewer_hits() -> None:
    # LRU has the stack property: what a cache holds, a larger one holds too.
    generator = torch.Generator().manual_seed(0)
    accesses = [Key(0, int(e)) for e in torch.randint(0, 12, (500,), generator=generator)]
    hits = [sum(touch.hit for touch in replay(Lru(size), accesses)) for size in range(1, 13)]
    assert hits == sorted(hits)
