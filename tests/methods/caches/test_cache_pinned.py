"""What the cache pinned promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Key
from mixtura.methods.caches.pinned import Pinned


def taught(share: float) -> Pinned:
    cache = Pinned(4, share=share)
    cache.learn({0: [5.0, 1.0, 0.0], 1: [4.0, 9.0, 0.0]})
    return cache


def test_the_most_chosen_of_all_layers_stay() -> None:
    cache = taught(0.5)
    for key in (Key(1, 1), Key(0, 0), Key(1, 0), Key(0, 1)):
        cache.touch(*key)
    assert [cache.touch(2, expert).evicted for expert in range(3)] == [Key(1, 0), Key(0, 1), Key(2, 0)]


def test_without_a_share_nothing_is_pinned() -> None:
    cache = taught(0.0)
    for key in (Key(1, 1), Key(0, 0), Key(1, 0), Key(0, 1)):
        cache.touch(*key)
    assert cache.touch(2, 0).evicted == Key(1, 1)


def test_pinned_ones_go_where_there_is_no_other() -> None:
    cache = taught(1.0)
    keys = [Key(1, 1), Key(0, 0), Key(1, 0), Key(0, 1)]
    for key in keys:
        cache.touch(*key)
    assert cache.touch(2, 0, held=keys[:1]).evicted == Key(0, 0)
