"""The arena of estimators: every problem with its estimators and baselines, several seeds, and the page."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from mixtura.errors import UnknownNameError
from mixtura.report.intervals import half_width
from mixtura.running.estimating.baselines import NAMES
from mixtura.running.estimating.lessons import Problem
from mixtura.running.estimating.measures import measure
from mixtura.running.estimating.problems import NOT_COMPARED, PROBLEMS

Say = Callable[[str], None]
# Raised when a change makes earlier results not comparable.
VERSION: Final = 1
# What knows what nobody can: shown, and not to be beaten.
HINDSIGHT: Final = "best asset in hindsight"


@final
@dataclass(slots=True)
class Compared:
    """One entry at one problem: a number a seed, larger is better.

    Attributes:
        difference: from the best baseline, whose name is ``beside``, on the same seeds; 0 for baselines.
        half_width: of the 95 % interval of the difference; None with one seed.
        verdict: "beats", "does not beat" or "baseline".
    """

    problem: str
    name: str
    measure: str
    values: list[float] = field(default_factory=list)
    beside: str = ""
    difference: float = 0.0
    half_width: float | None = None
    verdict: str = "baseline"

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)


def hold(names: Sequence[str], num_seeds: int, runs: Path, say: Say) -> list[Compared]:
    """Run what has no result yet, and compare.

    Args:
        names: of estimators or problems; none means all.
        num_seeds: data and starts of each entry.
        runs: where results of single runs are kept.
        say: told what is done.

    Raises:
        UnknownNameError: nothing of that name takes part.
    """
    known = {name for one in PROBLEMS for name in (one.name, *one.entries)}
    for name in names:
        if name not in known:
            raise UnknownNameError("entry in the arena of estimators", name, known)
    table: list[Compared] = []
    for problem in PROBLEMS:
        if not names or {problem.name, *problem.entries} & set(names):
            table += _compared(problem, num_seeds, runs, say)
    return table


def _compared(problem: Problem, num_seeds: int, runs: Path, say: Say) -> list[Compared]:
    baselines = NAMES[problem.baselines]
    rows = []
    for name in (*problem.entries, *baselines):
        row = Compared(problem.name, name, problem.measure)
        for seed in range(num_seeds):
            row.values.append(_kept(problem, name, seed, runs))
        say(f"{problem.name}, {name}: {problem.measure} {row.mean:.4f}")
        rows.append(row)
    rivals = [row for row in rows if row.name in baselines and row.name != HINDSIGHT]
    best = max(rivals, key=lambda row: row.mean)
    for row in rows:
        if row.name in problem.entries:
            pairs = [a - b for a, b in zip(row.values, best.values, strict=True)]
            row.beside, row.difference = best.name, statistics.fmean(pairs)
            row.half_width = half_width(pairs)
            sure = row.half_width is not None and row.difference > row.half_width
            row.verdict = "beats" if sure else "does not beat"
    return sorted(rows, key=lambda row: -row.mean)


def _kept(problem: Problem, name: str, seed: int, runs: Path) -> float:
    """The result of a run that was done before, or is done now and kept."""
    words = f"{problem.name}-{name}-{seed}".replace(" ", "_")
    file = runs / "estimators" / f"{words}.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("version") == VERSION:
            return float(found["value"])
    value = measure(problem, name, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps({"version": VERSION, "value": value}) + "\n", encoding="utf-8")
    aside.replace(file)
    return value


def as_csv(table: Sequence[Compared]) -> str:
    """Every seed's number, a line each."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["problem", "name", "measure", "seed", "value", "verdict"])
    for row in table:
        for seed, value in enumerate(row.values):
            lines.writerow([row.problem, row.name, row.measure, seed, f"{value:.6g}", row.verdict])
    return out.getvalue()


def markdown(table: Sequence[Compared], num_seeds: int, facts: str) -> str:
    """The page."""
    judged = [row for row in table if row.verdict != "baseline"]
    beaten = sum(row.verdict == "beats" for row in judged)
    parts = [
        "# The arena: estimators",
        _ABOUT.format(seeds=num_seeds, facts=facts, missing=", ".join(sorted(NOT_COMPARED))),
        f"Of {len(judged)} estimators {beaten} beat the best of their baselines, "
        f"{len(judged) - beaten} do not.",
    ]
    for problem in PROBLEMS:
        rows = [row for row in table if row.problem == problem.name]
        if rows:
            parts += [f"## {problem.name}", problem.about, _rows(rows)]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


_ABOUT = (
    "Written by `mixtura arena estimators`. Each estimator with its own settings beside plain models, the "
    "same data for all of a seed, {seeds} seeds. Nothing was tuned on what is tested, but that a "
    "first seed of `cot` showed that its `unseen` of 0 fails. {facts} No problem here asks for what these "
    "do, so they are not compared: {missing}."
)
_LEGEND = (
    "Larger is better. The best baseline is the one that is best on these very tests. **beats**: the mean "
    "difference to it, seed by seed, is above half of its own 95 % interval; **does not beat**: it is not, "
    "be it worse or not told apart. The network of equal size has one hidden layer and about as many weights "
    "as the problem's first estimator. Baselines are in italics."
)


def _rows(rows: Sequence[Compared]) -> str:
    lines = [f"| | {rows[0].measure} | to the best baseline | ± 95 % | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        is_plain = row.verdict == "baseline"
        name = f"*{row.name}*" if is_plain else f"[`{row.name}`](../methods/estimators/{row.name}.md)"
        half = "–" if row.half_width is None else f"{row.half_width:.4f}"
        between = ["", "", ""] if is_plain else [f"{row.difference:+.4f}", half, row.verdict]
        lines.append("| " + " | ".join([name, f"{row.mean:.4f}", *between]) + " |")
    return "\n".join(lines)
