"""What the cache activation_aware promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Call, Key
from mixtura.methods.caches.activation_aware import ActivationAware


def filled() -> ActivationAware:
    cache = ActivationAware(3)
    cache.see(Call(0, (0, 1), (6, 2)))
    cache.see(Call(1, (0,), (4,)))
    for key in (Key(0, 0), Key(0, 1), Key(1, 0)):
        cache.touch(*key)
    return cache


def test_the_least_share_of_its_layer_leaves() -> None:
    assert filled().touch(2, 0).evicted == Key(0, 1)


def test_another_text_counts_anew() -> None:
    cache = filled()
    cache.begin()
    cache.see(Call(0, (1,), (1,)))
    # Of those that this text has not needed, the least recent.
    assert cache.touch(2, 0).evicted == Key(0, 0)
