"""Losses of methods and baselines by seed: kept as they come, and compared in pairs with a baseline."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.report.intervals import half_width
from mixtura.train.arena.plot import Point


@final
@dataclass(slots=True)
class Row:
    """A method or baseline: what was measured by seed; ``loss`` is what is compared, smaller is better.

    Attributes:
        group: what it is compared within.
        difference: of the loss from the group's reference on the same seeds; 0 for baselines.
        half_width: of the 95 % interval of the difference; None with one seed.
        verdict: "better", "worse", "not separated" or "baseline".
    """

    name: str
    group: str = ""
    runs: list[Mapping[str, float]] = field(default_factory=list)
    difference: float = 0.0
    half_width: float | None = None
    verdict: str = "baseline"

    def mean(self, what: str) -> float:
        """Over the seeds."""
        return statistics.fmean(run[what] for run in self.runs)


def judge(row: Row, reference: Row) -> None:
    """Compare a method's losses with the reference's, seed by seed."""
    pairs = [a["loss"] - b["loss"] for a, b in zip(row.runs, reference.runs, strict=True)]
    row.difference, row.half_width = statistics.fmean(pairs), half_width(pairs)
    row.verdict = "not separated"
    if row.half_width is not None and abs(row.difference) > row.half_width:
        row.verdict = "better" if row.difference < 0 else "worse"


def kept(file: Path, terms: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured before on the same terms, or is now, and kept: whole or not at all."""
    wanted = json.loads(json.dumps(dict(terms)))
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        if found.get("terms") == wanted:
            return dict(found["result"])
    result = dict(measure())
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps({"terms": wanted, "result": result}) + "\n", encoding="utf-8")
    aside.replace(file)
    return result


def as_csv(table: Sequence[Row], columns: Sequence[str]) -> str:
    """Every seed's numbers, a line each."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["group", "name", "seed", *columns, "verdict"])
    for row in table:
        for seed, run in enumerate(row.runs):
            numbers = [f"{run[column]:.6g}" for column in columns]
            lines.writerow([row.group, row.name, seed, *numbers, row.verdict])
    return out.getvalue()


def points(table: Sequence[Row], across: str) -> list[Point]:
    """The points of a picture: losses against a number that was measured, ``across``."""
    return [
        Point(
            row.name,
            row.mean(across),
            row.mean("loss"),
            row.half_width or 0.0,
            "reference" if row.verdict == "baseline" else row.verdict,
            baseline=row.verdict == "baseline",
        )
        for row in table
    ]


def difference_cells(row: Row) -> list[str]:
    """The cells of a page's table that say how a row compares."""
    if row.verdict == "baseline":
        return ["", "", ""]
    half = "–" if row.half_width is None else f"{row.half_width:.4f}"
    return [f"{row.difference:+.4f}", half, row.verdict]


def name_cell(row: Row, kind: str) -> str:
    """A row's name: a link to the method's page, or a baseline in italics."""
    if row.verdict == "baseline":
        return f"*{row.name}*"
    return f"[`{row.name}`](../methods/{kind}/{row.name}.md)"
