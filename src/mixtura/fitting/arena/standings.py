"""From measurements to tables: means over seeds, and which differences are more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from mixtura.fitting.arena.entries import PRUNERS, RANDOM, REFERENCE, entries
from mixtura.report.intervals import half_width
from mixtura.train.arena.standings import SIGNIFICANCE, chances

KEEPS = (0.75, 0.5, 0.25)
# At this share of the experts calibration on single domains is measured as well.
MIDDLE = 0.5
_MEANS = ("kl", "equal_top", "exact_answers", "task_accuracy", "agreement")

Row = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An entry's results at one share of the experts, over its seeds.

    Attributes:
        values: means over seeds by name.
        perplexity: by domain, and of all text.
        half_width: of the 95% interval of the mean KL; None with one seed.
        ratio: the KL over the reference's on the same text, geometric mean over seeds.
        p_value: of that ratio where there is no difference, by the spread of its logarithm pooled over
            entries, corrected for the number of comparisons (Holm); None with one seed.
        verdict: "better", "worse" or "not separated" by the p-value; "reference".
        by_domain: the KL on a domain's text, mean over domains, where the pruner saw that domain ("own"),
            all of them ("all") or one other ("another"); empty where that was not measured.
    """

    name: str
    keep: float
    num_seeds: int
    values: Mapping[str, float]
    perplexity: Mapping[str, float]
    half_width: float | None
    ratio: float
    p_value: float | None
    verdict: str
    baseline: bool
    by_domain: Mapping[str, float]


def standings(results: Sequence[Row], keep: float, kind: str = PRUNERS) -> list[Standing]:
    """Entries at one share of the experts, from the least KL to the largest."""
    plain = [row for row in results if row["keep"] == keep and row["calibration"] == "all"]
    by_name: dict[str, list[Row]] = {}
    for row in plain:
        by_name.setdefault(row["name"], []).append(row)
    reference = {row["seed"]: _log(row["kl"]) for row in by_name[REFERENCE]}
    logs = {
        name: [_log(row["kl"]) - reference[row["seed"]] for row in rows] for name, rows in by_name.items()
    }
    # Lots vary much more than what text makes of a criterion: they have a spread of their own.
    drawn = {name: one for name, one in logs.items() if name == RANDOM}
    found = chances({name: one for name, one in logs.items() if name not in (REFERENCE, RANDOM)})
    found |= chances(drawn)
    baselines = {entry.name for entry in entries(kind=kind) if entry.baseline}
    single = [row for row in results if row["keep"] == keep and row["calibration"] != "all"]
    made = [
        Standing(
            name=name,
            keep=keep,
            num_seeds=len(rows),
            values=_numbers(mean_of(rows)),
            perplexity=mean_of(rows)["perplexity"],
            half_width=half_width([row["kl"] for row in rows]),
            ratio=math.exp(statistics.fmean(logs[name])),
            p_value=found.get(name),
            verdict=_verdict(name, logs[name], found.get(name)),
            baseline=name in baselines,
            by_domain=_by_domain(rows, [row for row in single if row["name"] == name]),
        )
        for name, rows in by_name.items()
    ]
    return sorted(made, key=lambda one: one.values["kl"])


def _log(kl: float) -> float:
    """The logarithm of a divergence; of none at all, that of what float32 cannot tell from none."""
    return math.log(max(kl, 1e-9))


def mean_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over seeds: of what all rows have, and of perplexities by domain."""
    known = [key for key in _MEANS if all(row.get(key) is not None for row in rows)]
    means: dict[str, Any] = {key: statistics.fmean(row[key] for row in rows) for key in known}
    domains = rows[0]["perplexity"]
    means["perplexity"] = {name: statistics.fmean(r["perplexity"][name] for r in rows) for name in domains}
    return means


def _numbers(means: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in means.items() if isinstance(value, float)}


def _verdict(name: str, logs: Sequence[float], chance: float | None) -> str:
    if name == REFERENCE:
        return "reference"
    if chance is None or chance >= SIGNIFICANCE:
        return "not separated"
    return "better" if statistics.fmean(logs) < 0 else "worse"


def _by_domain(rows: Sequence[Row], single: Sequence[Row]) -> dict[str, float]:
    """See `Standing`."""
    if not single:
        return {}
    pairs = [(r["calibration"], name, kl) for r in single for name, kl in r["kl_by_domain"].items()]
    whole = [kl for row in rows for kl in row["kl_by_domain"].values()]
    return {
        "own": statistics.fmean(kl for seen, read, kl in pairs if seen == read),
        "all": statistics.fmean(whole),
        "another": statistics.fmean(kl for seen, read, kl in pairs if seen != read),
    }
