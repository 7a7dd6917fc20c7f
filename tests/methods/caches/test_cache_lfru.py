"""What the cache lfru promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Key
from mixtura.methods.caches.lfru import Lfru


def evicted(cache: Lfru, *experts: int) -> list[int | None]:
    found = [cache.touch(0, expert).evicted for expert in experts]
    return [None if key is None else key.expert for key in found]


def test_what_was_needed_again_outlives_what_came_later() -> None:
    assert evicted(Lfru(4), 1, 1, 2, 2, 3, 4, 5, 6) == [None] * 6 + [3, 4]


def test_the_privileged_part_goes_by_age() -> None:
    # Room for one: 2 takes the place of 1, which falls back with its count of 3.
    cache = Lfru(3, share=0.34)
    assert evicted(cache, 1, 1, 1, 2, 2, 3, 4) == [None] * 6 + [3]
    # Nothing but 1, 2 and 4, of which 4 has the least count in the common part.
    assert evicted(cache, 5) == [4]


def test_without_a_privileged_part_it_is_the_count() -> None:
    assert evicted(Lfru(2, share=0.0), 1, 1, 1, 2, 2, 3, 1, 2) == [None, None, None, None, None, 2, None, 3]


def test_what_is_held_stays_in_either_part() -> None:
    cache = Lfru(2, share=1.0)
    evicted(cache, 1, 1, 2, 2)
    assert cache.touch(0, 3, held=[Key(0, 1)]).evicted == Key(0, 2)
