"""From runs to a table: means over seeds, intervals, and which differences are more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from mixtura.report.intervals import half_width
from mixtura.train.arena.entries import REFERENCE

# Verdicts err on this share of tables, over all their comparisons together.
SIGNIFICANCE = 0.05

MEANS = (
    "bits_per_byte", "experts_per_token", "max_over_mean", "dead_experts", "fluctuation", "specialisation",
    "overhead_us", "time_ratio", "num_parameters",
)  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """An entry's results over its seeds.

    Attributes:
        values: means over seeds by name.
        half_width: of the 95% interval of bits per byte from the entry's own seeds; None with one.
        difference: bits per byte more than the reference, the same seeds compared; None without it.
        p_value: of that difference under no difference, by the spread of differences pooled over
            entries, corrected for the number of comparisons (Holm); None without one.
        verdict: "better", "worse" or "not separated" by the p-value; "not comparable" for one that
            sees later tokens.
    """

    name: str
    num_seeds: int
    values: Mapping[str, float]
    half_width: float | None
    difference: float | None
    p_value: float | None
    verdict: str
    baseline: bool
    leaks: bool
    error: str = ""


def standings(results: Sequence[Mapping[str, Any]], baselines: Sequence[str]) -> list[Standing]:
    """Entries from the best to the worst; those that could not be trained last."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for one in results:
        by_name.setdefault(str(one["name"]), []).append(one)
    reference = {
        one["seed"]: one["bits_per_byte"] for one in by_name.get(REFERENCE, []) if "error" not in one
    }
    pairs = {name: _differences(runs, reference) for name, runs in by_name.items() if name != REFERENCE}
    leaking = {name for name, runs in by_name.items() if any(one.get("leaks") for one in runs)}
    corrected = chances({name: found for name, found in pairs.items() if name not in leaking})
    made = [
        _standing(
            name,
            runs,
            pairs.get(name, []),
            corrected.get(name),
            baseline=name in baselines,
            leaks=name in leaking,
        )
        for name, runs in by_name.items()
    ]
    return sorted(made, key=lambda one: (bool(one.error), one.values.get("bits_per_byte", math.inf)))


def _differences(runs: Sequence[Mapping[str, Any]], reference: Mapping[int, float]) -> list[float]:
    return [
        r["bits_per_byte"] - reference[r["seed"]] for r in runs if "error" not in r and r["seed"] in reference
    ]


def chances(pairs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each entry's p-value by Student's t with a common spread, corrected by Holm's step-down rule."""
    groups = {name: one for name, one in pairs.items() if one}
    degrees = sum(len(one) - 1 for one in groups.values())
    if not degrees:
        return {}
    squares = sum(sum((x - statistics.fmean(one)) ** 2 for x in one) for one in groups.values())
    spread = math.sqrt(squares / degrees)
    plain = {n: _chance(statistics.fmean(d), spread / math.sqrt(len(d)), degrees) for n, d in groups.items()}
    corrected: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(plain, key=lambda one: plain[one])):
        least = max(least, min(1.0, (len(plain) - place) * plain[name]))
        corrected[name] = least
    return corrected


def _chance(difference: float, error: float, degrees: int) -> float:
    """The chance of so large a difference of either sign where there is none."""
    from scipy import stats

    if not error:
        return float(difference == 0)
    return float(2 * stats.t.sf(abs(difference) / error, degrees))


def _standing(
    name: str,
    runs: Sequence[Mapping[str, Any]],
    pairs: Sequence[float],
    chance: float | None,
    *,
    baseline: bool,
    leaks: bool,
) -> Standing:
    errors = [str(one["error"]) for one in runs if "error" in one]
    good = [one for one in runs if "error" not in one]
    if errors or not good:
        why = errors[0] if errors else ""
        return Standing(name, len(good), {}, None, None, None, "not trained", baseline, False, why)
    known = [key for key in MEANS if all(one.get(key) is not None for one in good)]
    means = {key: statistics.fmean(one[key] for one in good) for key in known}
    half = half_width([one["bits_per_byte"] for one in good])
    difference = statistics.fmean(pairs) if pairs else None
    verdict = _verdict(name, difference, chance, leaks)
    return Standing(name, len(good), means, half, difference, chance, verdict, baseline, leaks)


def _verdict(name: str, difference: float | None, chance: float | None, leaks: bool) -> str:
    if name == REFERENCE:
        return "reference"
    if leaks:
        return "not comparable"
    if difference is None or chance is None or chance >= SIGNIFICANCE:
        return "not separated"
    return "better" if difference < 0 else "worse"
