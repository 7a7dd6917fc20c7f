"""The page on choosing a pruner repeats the measured tables' numbers and links to pages that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mixtura.fitting.arena.standings import KEEPS, MIDDLE, standings

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "which_pruner.md"


def test_every_number_is_the_one_that_was_measured() -> None:
    cases = json.loads((DOCS / "arena" / "pruners.json").read_text(encoding="utf-8"))["cases"]
    tables = {keep: {one.name: one for one in standings(cases, keep)} for keep in KEEPS}
    named = re.findall(
        r"^\| \[`(\w+)`\]\(methods/pruners/\1\.md\) \|(.*)\|$",
        PAGE.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert named
    for name, line in named:
        own = tables[MIDDLE][name].by_domain.get("own")
        expected = [f"{tables[keep][name].values['kl']:.3f}" for keep in KEEPS]
        expected += ["–" if own is None else f"{own:.3f}", tables[MIDDLE][name].verdict]
        assert [cell.strip() for cell in line.split("|")][: len(expected)] == expected, name


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (DOCS / link).exists(), link
