"""The arena of prefetchers: recorded texts at stated rates of disk and memory, with and without each."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Final, final

from mixtura.errors import UnknownNameError
from mixtura.methods import create, header, own_names
from mixtura.methods.prefetchers import Prefetcher
from mixtura.report.units import format_bytes
from mixtura.running.tiers.ahead import room_for_guesses
from mixtura.running.tiers.choosing import AUTO, cache_of
from mixtura.running.tiers.cost import other_bytes
from mixtura.running.tiers.recording import Recorded, record
from mixtura.running.tiers.simulation import Foresight, Rates, Timed, replay_timed

# What every prefetcher is measured by: nobody who guesses, and one who knows.
NONE, ORACLE = "none", "oracle"
# A solid state disk and the memory of a desktop computer.
DISK_BYTES_PER_S, MEMORY_BYTES_PER_S = 1.5e9, 25e9
# Layers ahead for which routers are asked.
OUTLOOK: Final = 3
Say = Callable[[str], None]


@final
@dataclass(slots=True)
class Guessed:
    """One prefetcher at one size, over all texts; a number of each text.

    Attributes:
        name: of the prefetcher, `NONE` or `ORACLE`.
        num_slots: room for experts, that for guesses with it.
        share: of all experts.
        tokens_per_second: at the stated rates.
        hit_rates: experts that were in memory, or on their way by a guess.
        wasted_bytes: read in vain, a token.
        late: of guesses that were right, those that were not there in time.
        p99_stall_ms: time without work of all but the worst hundredth of tokens.
        gained: of the time that knowing the future saves, the share that was saved.
        is_off: texts in which it was switched off.
    """

    name: str
    num_slots: int
    share: float
    tokens_per_second: list[float] = field(default_factory=list)
    hit_rates: list[float] = field(default_factory=list)
    wasted_bytes: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    p99_stall_ms: list[float] = field(default_factory=list)
    gained: list[float] = field(default_factory=list)
    is_off: int = 0


def hold(path: Path, names: Sequence[str], num_texts: int, num_tokens: int, say: Say) -> list[Guessed]:
    """Record texts and run them at several sizes with every prefetcher.

    Args:
        path: a checkpoint directory.
        names: prefetchers; `NONE` and `ORACLE` always take part, and none means all.
        num_texts: texts of their own, each with another seed; one more is what ``reads:trace`` learns from.
        num_tokens: of each.
        say: told what is done.

    Raises:
        UnknownNameError: there is no such prefetcher.
    """
    known = own_names("prefetchers")
    for name in names:
        if name not in known:
            raise UnknownNameError("prefetcher", name, known)
    chosen = [name for name in known if not names or name in names]
    rates = Rates(
        disk_bytes_per_s=DISK_BYTES_PER_S,
        memory_bytes_per_s=MEMORY_BYTES_PER_S,
        other_bytes=other_bytes(path),
    )
    say(f"recording a text of {num_tokens} tokens for prefetchers that learn")
    pairs = record(path, num_tokens, num_texts).pairs
    table: dict[tuple[str, int], Guessed] = {}
    for seed in range(num_texts):
        say(f"recording text {seed + 1} of {num_texts}")
        recorded = record(path, num_tokens, seed, outlook=OUTLOOK)
        for size in recorded.sizes():
            say(f"running it with room for {size} of {sum(recorded.num_experts)} experts")
            _run_all(table, chosen, size, recorded, rates, pairs)
    return sorted(table.values(), key=lambda one: (one.num_slots, -_mean(one.tokens_per_second), one.name))


def _run_all(
    table: dict[tuple[str, int], Guessed],
    names: Sequence[str],
    size: int,
    recorded: Recorded,
    rates: Rates,
    pairs: dict[int, list[list[float]]],
) -> None:
    room = room_for_guesses(size, sum(recorded.num_experts), recorded.top_k)
    found: dict[str, Timed] = {NONE: replay_timed(recorded, cache_of(AUTO, size), rates)}
    for name in (*names, ORACLE):
        guesser: Prefetcher = Foresight(recorded) if name == ORACLE else create("prefetchers", name)
        if name != ORACLE and "reads:trace" in header("prefetchers", name).tags:
            guesser.learn(pairs)
        found[name] = replay_timed(recorded, cache_of(AUTO, size - room), rates, guesser, room)
    slowest, fastest = (sum(found[name].token_ms) for name in (NONE, ORACLE))
    for name, timed in found.items():
        one = table.setdefault((name, size), Guessed(name, size, size / sum(recorded.num_experts)))
        one.tokens_per_second.append(timed.tokens_per_second)
        one.hit_rates.append(timed.statistics.hit_rate)
        one.wasted_bytes.append(timed.statistics.wasted_bytes / recorded.num_tokens)
        one.late.append(timed.late_share)
        one.p99_stall_ms.append(timed.p99_stall_ms)
        saved, possible = slowest - sum(timed.token_ms), slowest - fastest
        one.gained.append(saved / possible if possible > 0 else 0.0)
        one.is_off += timed.is_off


_ABOUT = (
    "Written by `mixtura arena prefetchers`. The choices of {model} on {texts} of {tokens:,} tokens of "
    "held-out text, token by token, run at stated rates: {disk:g} GB/s of disk and {memory:g} GB/s of "
    "memory, with the cache `auto`. Nothing is read or computed: it is what the bytes alone would take. "
    "{day}."
)
_LEGEND = (
    "**speed**: over that of *none*. **hit rate**: experts that were in memory or on their way. "
    "**wasted**: bytes that were read for nothing, a token. **late**: of the guesses that were right, "
    "those that were not there in time. **stall**: the time without work that 99 of 100 tokens do not "
    "exceed, over that of *none*. **gained**: of the time that knowing the next three layers saves "
    "(*oracle*), the share that was saved; less than nothing where the room for guesses costs more than "
    "they bring. **off**: texts in which it was switched off, as too little of what it read was needed. "
    "The oracle has the same room for guesses as the others, so that it is what guessing can be worth and "
    "not the least possible time."
)


def markdown(table: Sequence[Guessed], model: str, num_texts: int, num_tokens: int) -> str:
    """The page."""
    texts = "a text" if num_texts == 1 else f"{num_texts} texts"
    about = _ABOUT.format(
        model=model,
        texts=texts,
        tokens=num_tokens,
        disk=DISK_BYTES_PER_S / 1e9,
        memory=MEMORY_BYTES_PER_S / 1e9,
        day=date.today().isoformat(),
    )
    parts = ["# The arena: prefetchers", about]
    for size in dict.fromkeys(one.num_slots for one in table):
        rows = [one for one in table if one.num_slots == size]
        parts += [f"## Room for {rows[0].share:.0%} of the experts ({size})", _rows(rows)]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def as_csv(table: Sequence[Guessed]) -> str:
    """Every text's numbers, a line each."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    columns = ["tokens_per_second", "hit_rates", "wasted_bytes", "late", "p99_stall_ms", "gained"]
    lines.writerow(["prefetcher", "slots", "share", "text", *columns])
    for one in table:
        for text in range(len(one.hit_rates)):
            values = [f"{getattr(one, column)[text]:.5g}" for column in columns]
            lines.writerow([one.name, one.num_slots, f"{one.share:.4f}", text, *values])
    return out.getvalue()


def _rows(rows: Sequence[Guessed]) -> str:
    lines = ["| prefetcher | speed | hit rate | wasted | late | stall | gained | off |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    plain = next(one for one in rows if one.name == NONE)
    for one in rows:
        name = f"*{one.name}*" if one.name in (NONE, ORACLE) else f"`{one.name}`"
        speed = _mean(one.tokens_per_second) / _mean(plain.tokens_per_second)
        stall = _mean(one.p99_stall_ms) / (_mean(plain.p99_stall_ms) or 1.0)
        off = f"{one.is_off} of {len(one.hit_rates)}" if one.is_off else ""
        cells = [f"{speed:.3f}", f"{_mean(one.hit_rates):.1%}", format_bytes(_mean(one.wasted_bytes))]
        cells += [f"{_mean(one.late):.0%}", f"{stall:.2f}", f"{_mean(one.gained):.0%}", off]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
