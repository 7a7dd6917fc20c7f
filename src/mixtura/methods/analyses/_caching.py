"""The best cache of one size that looks a segment ahead, replayed over one sequence's choices."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence


def segment_hits(tokens: Sequence[Sequence[int]], size: int, ahead: int) -> int:
    """How many choices of a sequence's tokens are in a cache of experts when their token begins.

    After each choice the expert is in the cache; the one that goes for it is needed least often in the
    segment of ``ahead`` tokens that begins with this one, of several the one that was used longest ago. An
    expert that was never needed before counts as there while the cache has room for one more, as its authors
    count it.
    """
    needed: Counter[int] = Counter(expert for token in tokens[:ahead] for expert in token)
    coming = deque(tokens[ahead:])
    used: dict[int, int] = {}
    inside: set[int] = set()
    hits = clock = 0
    for token in tokens:
        known = len(used)
        for expert in token:
            if expert in used:
                hits += expert in inside
            else:
                hits += known < size
                known += 1
        for expert in token:
            if expert not in inside:
                if len(inside) == size:
                    inside.remove(min(inside, key=lambda one: (needed[one], used[one])))
                inside.add(expert)
            clock += 1
            needed[expert] -= 1
            used[expert] = clock
        if coming:
            needed.update(coming.popleft())
    return hits
