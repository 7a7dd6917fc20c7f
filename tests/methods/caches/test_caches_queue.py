"""The queue caches share, beside a search through all ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mixtura.methods.caches import Key
from mixtura.methods.caches._shared import Queue


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)) | st.none(), max_size=120))
def test_pops_the_least_rank(steps: list[tuple[int, int] | None]) -> None:
    queue = Queue()
    ranks: dict[Key, int] = {}
    for step in steps:
        if step is not None:
            key, rank = Key(0, step[0]), step[1]
            queue.put(key, rank)
            ranks[key] = rank
        elif ranks:
            least = min(ranks, key=lambda key: (ranks[key], key))
            assert queue.pop() == least
            del ranks[least]


def test_old_entries_do_not_pile_up() -> None:
    queue = Queue()
    for rank in range(10_000):
        queue.put(Key(0, rank % 3), rank)
    assert len(queue._heap) < 50
