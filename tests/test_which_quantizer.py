"""The page on choosing a quantizer repeats the measured tables' numbers and links to pages that are there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from mixtura.methods import names

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "which_quantizer.md"
SIZES = ("2.25", "4.25")


def test_every_number_is_the_one_that_was_measured() -> None:
    with (DOCS / "arena" / "quantizers.csv").open(newline="", encoding="utf-8") as file:
        measured = {(row["name"], row["rung"]): row for row in csv.DictReader(file)}
    named = re.findall(
        r"^\| \[`(\w+)`\]\(methods/quantizers/\1\.md\) \|(.*)\|$",
        PAGE.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert {name for name, _ in named} == set(names("quantizers"))
    for name, line in named:
        rows = [measured[name, size] for size in SIZES]
        expected = [f"{float(row['kl']):.3g}" for row in rows]
        expected.append(", ".join(row["verdict"] for row in rows))
        assert [cell.strip() for cell in line.split("|")] == expected, name


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (DOCS / link).exists(), link
