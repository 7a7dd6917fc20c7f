"""The page of the arena of caches, and its table as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import date

from mixtura.report.units import format_bytes
from mixtura.running.tiers.arena import BOUND, REFERENCE, Standing

_ABOUT = (
    "Written by `mixtura arena caches`. The choices of {model} on {texts} of {tokens:,} tokens of held-out "
    "text (code, prose and tasks), token by token, replayed through every cache with its default settings. "
    "{day}."
)
_LEGEND = (
    "**hit rate**: experts that were in memory when they were needed. **read**: bytes that a token waits "
    "for. **misses**: over those of `belady`, which knows the future and is the best that any cache of the "
    "size can do. **±**: half of the range over the texts. Caches that learn from a trace were given another "
    "text of the same kinds. A small model on short texts ranks caches for itself; run the command on yours "
    "with `--model DIRECTORY`."
)


def markdown(table: Sequence[Standing], model: str, num_texts: int, num_tokens: int) -> str:
    """The page."""
    texts = "a text" if num_texts == 1 else f"{num_texts} texts"
    day = date.today().isoformat()
    parts = ["# The arena: caches", _ABOUT.format(model=model, texts=texts, tokens=num_tokens, day=day)]
    for size in dict.fromkeys(one.num_slots for one in table):
        rows = [one for one in table if one.num_slots == size]
        parts += [f"## Room for {rows[0].share:.0%} of the experts ({size})", _rows(rows)]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def as_csv(table: Sequence[Standing]) -> str:
    """Every text's numbers, a line each."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        ["cache", "slots", "share", "text", "hit_rate", "missed_bytes_per_token", "misses_to_belady"]
    )
    for one in table:
        numbers = zip(one.hit_rates, one.missed_bytes, one.over_bound, strict=True)
        for text, (rate, missed, over) in enumerate(numbers):
            lines.writerow(
                [
                    one.name,
                    one.num_slots,
                    f"{one.share:.4f}",
                    text,
                    f"{rate:.5f}",
                    f"{missed:.1f}",
                    f"{over:.4f}",
                ]
            )
    return out.getvalue()


def _rows(rows: Sequence[Standing]) -> str:
    lines = ["|  | cache | hit rate | ± | read | misses |", "|---|---|---|---|---|---|"]
    place = 0
    for one in rows:
        place += one.name != BOUND
        name = f"*{one.name}*" if one.name in (BOUND, REFERENCE) else f"`{one.name}`"
        spread = (max(one.hit_rates) - min(one.hit_rates)) / 2
        rate, read, over = (sum(v) / len(v) for v in (one.hit_rates, one.missed_bytes, one.over_bound))
        number = "" if one.name == BOUND else place
        lines.append(f"| {number} | {name} | {rate:.1%} | {spread:.1%} | {format_bytes(read)} | {over:.2f} |")
    return "\n".join(lines)
