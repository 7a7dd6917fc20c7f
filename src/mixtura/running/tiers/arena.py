"""The arena of caches: a model's choices, recorded on text, through every cache at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from mixtura.errors import UnknownNameError
from mixtura.methods import own_names
from mixtura.methods.caches import Cache, Key
from mixtura.running.tiers.choosing import AUTO, cache_of
from mixtura.running.tiers.recording import Recorded, record

# What every other cache is measured by: the best that is possible, and the usual one.
BOUND: Final = "belady"
REFERENCE: Final = "lru"
Say = Callable[[str], None]


@final
@dataclass(slots=True)
class Standing:
    """One cache at one size, over all texts.

    Attributes:
        name: of the cache.
        num_slots: experts that it has room for.
        share: of all experts.
        hit_rates: of each text.
        missed_bytes: read for each token, of each text.
        over_bound: misses over those of `BOUND`, of each text.
    """

    name: str
    num_slots: int
    share: float
    hit_rates: list[float] = field(default_factory=list)
    missed_bytes: list[float] = field(default_factory=list)
    over_bound: list[float] = field(default_factory=list)


def replay_calls(cache: Cache, recorded: Recorded) -> tuple[int, int]:
    """How many experts were needed, and how many of them a cache had.

    Experts of one call are held together, as when they run; all but the bound, which is one without that.
    """
    is_bound = type(cache).__module__.endswith(f".{BOUND}")
    if is_bound:
        cache.foresee([Key(c.layer, e) for text in recorded.texts for c in text for e in c.experts])
    needed = hits = 0
    for text in recorded.texts:
        cache.begin()
        for call in text:
            cache.see(call)
            held = frozenset(Key(call.layer, expert) for expert in call.experts)
            for expert in call.experts:
                hits += cache.touch(call.layer, expert, () if is_bound else held).hit
            needed += len(call.experts)
    return needed, hits


def hold(path: Path, names: Sequence[str], num_texts: int, num_tokens: int, say: Say) -> list[Standing]:
    """Record texts and replay them through caches of several sizes.

    Args:
        path: a checkpoint directory.
        names: caches; `BOUND` and `REFERENCE` always take part, and none means all.
        num_texts: texts of their own, each with another seed; one more is what ``reads:trace`` learns from.
        num_tokens: of each.
        say: told what is done.

    Raises:
        UnknownNameError: there is no such cache.
    """
    known = [*own_names("caches"), AUTO]
    for name in names:
        if name not in known:
            raise UnknownNameError("cache", name, known)
    chosen = [name for name in known if not names or name in (*names, BOUND, REFERENCE)]
    say(f"recording a text of {num_tokens} tokens for caches that learn")
    lesson = record(path, num_tokens, num_texts).counts
    table: dict[tuple[str, int], Standing] = {}
    for seed in range(num_texts):
        say(f"recording text {seed + 1} of {num_texts}")
        recorded = record(path, num_tokens, seed)
        for size in recorded.sizes():
            say(f"replaying it with room for {size} of {sum(recorded.num_experts)} experts")
            _replay_all(table, chosen, size, recorded, lesson)
    return sorted(table.values(), key=lambda one: (one.num_slots, _mean(one.missed_bytes), one.name))


def _replay_all(
    table: dict[tuple[str, int], Standing],
    names: Sequence[str],
    size: int,
    recorded: Recorded,
    lesson: dict[int, list[float]],
) -> None:
    least = 0
    for name in sorted(names, key=lambda one: one != BOUND):
        cache = cache_of(name, size)
        if name != AUTO:
            cache.learn(lesson)
        needed, hits = replay_calls(cache, recorded)
        misses = needed - hits
        least = misses if name == BOUND else least
        one = table.setdefault((name, size), Standing(name, size, size / sum(recorded.num_experts)))
        one.hit_rates.append(hits / needed)
        one.missed_bytes.append(misses * recorded.expert_num_bytes / recorded.num_tokens)
        one.over_bound.append(misses / max(least, 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
