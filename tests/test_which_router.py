"""The page on choosing a router repeats the measured tables' numbers and links to pages that are there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "which_router.md"


def measured(kind: str) -> dict[str, dict[str, str]]:
    with (DOCS / "arena" / f"{kind}.csv").open(encoding="utf-8") as stream:
        return {row["name"]: row for row in csv.DictReader(stream)}


def rows() -> list[tuple[str, str, list[str]]]:
    """Kind, name and cells of every table row that names a method."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        named = re.match(r"\| \[`(\w+)`\]\(methods/(routers|balancers)/\w+\.md\) \|(.*)\|", line)
        if named:
            found.append((named[2], named[1], [cell.strip() for cell in named[3].split("|")]))
    return found


def test_every_number_is_the_one_that_was_measured() -> None:
    tables = {kind: measured(kind) for kind in ("routers", "balancers")}
    assert len(rows()) > 20
    for kind, name, cells in rows():
        row = tables[kind][name]
        expected = [f"{float(row['difference']):+.3f}"]
        if kind == "routers":
            expected += [f"{float(row['experts_per_token']):.2f}", f"{float(row['time_ratio']):.2f}"]
        else:
            expected += [f"{float(row['max_over_mean']):.2f}"]
        assert cells[: len(expected) + 1] == [*expected, row["verdict"]], name


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (DOCS / link).exists(), link
