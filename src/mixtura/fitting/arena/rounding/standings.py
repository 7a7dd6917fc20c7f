"""From measurements to a table for each size: means over seeds, and which differences are more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from mixtura.fitting.arena.rounding.entries import REFERENCE
from mixtura.report.intervals import half_width
from mixtura.train.arena.standings import SIGNIFICANCE, chances

Row = Mapping[str, Any]
# What float32 cannot tell from no divergence.
_LEAST_KL = 1e-9
_MEANS = ("kl", "equal_top", "perplexity", "output_error", "bits")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A quantizer at one size, over its seeds.

    Attributes:
        rung: bits of a weight that all at this size may take.
        settings: in words.
        half_width: of the 95% interval of the mean KL; None with one seed.
        ratio: the KL over the reference's on the same text, geometric mean over seeds.
        verdict: "better", "worse" or "not separated" by the spread of the ratio's logarithm, pooled over a
            size and corrected for the number of comparisons (Holm); "reference".
    """

    name: str
    rung: float
    settings: str
    num_seeds: int
    bits: float
    kl: float
    half_width: float | None
    ratio: float
    verdict: str
    equal_top: float
    perplexity: float
    output_error: float
    baseline: bool


def standings(results: Sequence[Row]) -> list[Standing]:
    """All sizes, smallest first, each from the least KL to the largest."""
    found = []
    for rung in sorted({row["rung"] for row in results}):
        found += _of_rung([row for row in results if row["rung"] == rung])
    return found


def _of_rung(results: Sequence[Row]) -> list[Standing]:
    by_name: dict[str, list[Row]] = {}
    for row in results:
        by_name.setdefault(row["name"], []).append(row)
    reference = {row["seed"]: _log(row) for row in by_name[REFERENCE]}
    logs = {name: [_log(row) - reference[row["seed"]] for row in rows] for name, rows in by_name.items()}
    found = chances({name: one for name, one in logs.items() if name != REFERENCE})
    made = [_standing(rows, logs[name], found.get(name)) for name, rows in by_name.items()]
    return sorted(made, key=lambda one: one.kl)


def _standing(rows: Sequence[Row], logs: Sequence[float], chance: float | None) -> Standing:
    first = rows[0]
    return Standing(
        name=first["name"],
        rung=first["rung"],
        settings=first["settings"],
        num_seeds=len(rows),
        half_width=half_width([row["kl"] for row in rows]),
        ratio=math.exp(statistics.fmean(logs)),
        verdict=_verdict(first["name"], logs, chance),
        baseline=first["name"] == REFERENCE,
        **{key: statistics.fmean(row[key] for row in rows) for key in _MEANS},
    )


def _log(row: Row) -> float:
    return math.log(max(row["kl"], _LEAST_KL))


def _verdict(name: str, logs: Sequence[float], chance: float | None) -> str:
    if name == REFERENCE:
        return "reference"
    if chance is None or chance >= SIGNIFICANCE:
        return "not separated"
    return "better" if statistics.fmean(logs) < 0 else "worse"
