"""What the cache belady promises beyond its kind's contract."""

from __future__ import annotations

from functools import cache as memoize

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.caches import Key, replay
from mixtura.methods.caches.belady import Belady


def most_hits(accesses: list[Key], capacity: int) -> int:
    """The most hits any choice of evictions can have, by trying all of them."""

    @memoize
    def best(position: int, inside: frozenset[Key]) -> int:
        if position == len(accesses):
            return 0
        key = accesses[position]
        if key in inside:
            return 1 + best(position + 1, inside)
        if len(inside) < capacity:
            return best(position + 1, inside | {key})
        return max(best(position + 1, inside - {gone} | {key}) for gone in inside)

    return best(0, frozenset())


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_evictions_has_more_hits(seed: int, capacity: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    accesses = [Key(0, int(e)) for e in torch.randint(0, 6, (24,), generator=generator)]
    hits = sum(touch.hit for touch in replay(Belady(capacity), accesses))
    assert hits == most_hits(accesses, capacity)


def test_what_was_not_foreseen_is_an_error() -> None:
    cache = Belady(2)
    cache.foresee([Key(0, 1), Key(0, 2)])
    cache.touch(0, 1)
    with pytest.raises(UserError, match="belady was not told that expert 3 of layer 0"):
        cache.touch(0, 3)


def test_the_future_may_come_in_parts() -> None:
    cache = Belady(2)
    for part in [(1, 2, 1), (2, 3, 1)]:
        accesses = [Key(0, expert) for expert in part]
        cache.foresee(accesses)
        hits = [cache.touch(*key).hit for key in accesses]
    # After the first part neither is needed again; after the second, 2 leaves for 3.
    assert hits == [True, False, True]
