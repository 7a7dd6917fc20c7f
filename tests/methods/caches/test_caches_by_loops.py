"""Caches against loops that keep a whole history and look through it at every eviction."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

from mixtura.methods import create
from mixtura.methods.caches import Cache, Call, Key, replay

CAPACITY = 5
# Of everything inside, and all that was touched before with whether it was a hit: who leaves.
Rule = Callable[[list[Key], list[tuple[Key, bool]]], Key]


def stream(seed: int, number: int = 300) -> list[Key]:
    """Experts of three layers, some needed more often than others."""
    drawn = random.Random(seed)
    return [Key(drawn.randrange(3), min(drawn.randrange(6), drawn.randrange(6))) for _ in range(number)]


def last_use(key: Key, history: Sequence[tuple[Key, bool]]) -> int:
    """When an expert was needed last."""
    return max(time for time, (one, _) in enumerate(history) if one == key)


def uses(key: Key, history: Sequence[tuple[Key, bool]], *, since_in: bool = False) -> int:
    """How often an expert was needed, perhaps since it came in last."""
    own = [hit for one, hit in history if one == key]
    if since_in:
        own = own[max(place for place, hit in enumerate(own) if not hit) :]
    return len(own)


def oldest(inside: list[Key], history: list[tuple[Key, bool]]) -> Key:
    """Least recently used."""
    return min(inside, key=lambda key: last_use(key, history))


def rarest(inside: list[Key], history: list[tuple[Key, bool]]) -> Key:
    """Least frequently used, since ever."""
    return min(inside, key=lambda key: (uses(key, history), last_use(key, history)))


def rarest_here(inside: list[Key], history: list[tuple[Key, bool]]) -> Key:
    """Least frequently used since it came in."""
    return min(inside, key=lambda key: (uses(key, history, since_in=True), last_use(key, history)))


def behind(inside: list[Key], history: list[tuple[Key, bool]]) -> Key:
    """Least frequent of those that were never needed again, or have fallen back from the recent two."""
    privileged: list[Key] = []
    counts: dict[Key, int] = {}
    for key, hit in history:
        counts[key] = counts.get(key, 0) + 1 if hit else 1
        if hit:
            privileged = [*(one for one in privileged if one != key), key][-2:]
        else:
            privileged = [one for one in privileged if one != key]
    common = [key for key in inside if key not in privileged]
    return min(common, key=lambda key: (counts[key], last_use(key, history)))


def deep(share: float) -> Rule:
    """Least recent of the layers whose experts, from the first layer on, do not fit in the share."""

    def rule(inside: list[Key], history: list[tuple[Key, bool]]) -> Key:
        layers = sorted({key.layer for key in inside})
        kept = [
            layer for layer in layers if sum(key.layer <= layer for key in inside) <= int(share * CAPACITY)
        ]
        free = [layer for layer in layers if layer not in kept] or [layers[-1]]
        return oldest([key for key in inside if key.layer >= free[0]], history)

    return rule


def pinned(inside: list[Key], history: list[tuple[Key, bool]]) -> Key:
    """Least recent of those that recorded text did not choose most: three of five."""
    best = {Key(0, 0), Key(0, 1), Key(1, 0)}
    return oldest([key for key in inside if key not in best] or inside, history)


RULES: list[tuple[str, dict[str, Any], Rule]] = [
    ("lru", {}, oldest),
    ("lfu", {}, rarest),
    ("lfu", {"forget": True}, rarest_here),
    ("lfru", {"share": 0.5}, behind),
    ("shallow", {"share": 0.0}, oldest),
    ("shallow", {"share": 0.5}, deep(0.5)),
    ("shallow", {"share": 1.0}, deep(1.0)),
    ("pinned", {"share": 0.75}, pinned),
]


def made(name: str, capacity: int = CAPACITY, **settings: Any) -> Cache:
    """A cache, told of what recorded text chose."""
    found = create("caches", name, capacity, **settings)
    assert isinstance(found, Cache)
    found.learn({0: [9.0, 8.0, 1.0], 1: [7.0, 2.0, 2.0], 2: [0.0, 6.5, 0.0]})
    return found


@pytest.mark.parametrize(("name", "settings", "rule"), RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_who_leaves_is_who_a_loop_finds(name: str, settings: dict[str, Any], rule: Rule, seed: int) -> None:
    keys = stream(seed)
    inside: list[Key] = []
    history: list[tuple[Key, bool]] = []
    for key, touch in zip(keys, replay(made(name, **settings), keys), strict=True):
        hit, evicted = key in inside, None
        if not hit and len(inside) == CAPACITY:
            evicted = rule(inside, history)
            inside.remove(evicted)
        if not hit:
            inside.append(key)
        history.append((key, hit))
        assert (touch.hit, touch.evicted) == (hit, evicted), len(history)


def most_hits(keys: tuple[Key, ...], capacity: int) -> int:
    """By trying every eviction there is."""

    @cache
    def best(time: int, inside: frozenset[Key]) -> int:
        if time == len(keys):
            return 0
        key = keys[time]
        if key in inside:
            return 1 + best(time + 1, inside)
        if len(inside) < capacity:
            return best(time + 1, inside | {key})
        return max(best(time + 1, (inside - {one}) | {key}) for one in inside)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(4))
def test_no_cache_has_more_hits_than_belady(seed: int) -> None:
    keys = stream(seed, 40)
    for capacity in (1, 2, 3):
        hits = sum(touch.hit for touch in replay(made("belady", capacity), keys))
        assert hits == most_hits(tuple(keys), capacity)


def test_scores_and_shares_of_the_text_are_those_of_a_loop() -> None:
    """Priorities of the router's shares, and shares of a layer's tokens, counted anew for each text."""
    drawn = random.Random(3)
    liked, active = made("scores", alpha=0.3, top=2), made("activation_aware")
    priority = {(layer, e): 0.0 for layer in range(3) for e in range(6)}
    rows: dict[tuple[int, int], int] = {}
    inside: dict[str, list[Key]] = {"scores": [], "activation_aware": []}
    order: list[Key] = []
    for time in range(120):
        if time == 60:
            active.begin()
            rows = {}
        layer = time % 3
        shares = [drawn.random() for _ in range(6)]
        experts = tuple(sorted(drawn.sample(range(6), 2)))
        counts = tuple(drawn.randrange(1, 5) for _ in experts)
        call = Call(layer, experts, counts, scores=tuple(shares))
        liked.see(call)
        active.see(call)
        best = sorted(range(6), key=lambda e: -shares[e])[:2]
        for e in range(6):
            priority[layer, e] = 0.7 * priority[layer, e] + (0.3 * shares[e] if e in best else 0.0)
        for expert, count in zip(experts, counts, strict=True):
            rows[layer, expert] = rows.get((layer, expert), 0) + count
        for expert in experts:
            key = Key(layer, expert)
            for name, one in (("scores", liked), ("activation_aware", active)):
                held, evicted = inside[name], None
                hit = key in held
                if not hit and len(held) == CAPACITY:
                    totals = [sum(n for (at, _), n in rows.items() if at == place) for place in range(3)]
                    told = {k: rows.get(k, 0) / (totals[k.layer] or 1) for k in held}
                    rank = {k: priority[k] for k in held} if name == "scores" else told
                    age = {k: place for place, k in enumerate(order)}
                    evicted = min((rank[k], age[k], k) for k in held)[2]
                    held.remove(evicted)
                if not hit:
                    held.append(key)
                touch = one.touch(*key)
                assert (touch.hit, touch.evicted) == (hit, evicted), (name, time)
            order = [*(k for k in order if k != key), key]
