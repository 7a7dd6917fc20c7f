"""The families table in the docs is what the last run of its script wrote, and nothing in it failed."""

from __future__ import annotations

import json

import transformers
from families import FAMILIES
from families_table import COLUMNS, DOCS, NEVER_UNIFORM, markdown

RESULT = json.loads((DOCS / "families.json").read_text(encoding="utf-8"))


def test_every_family_is_in_the_table() -> None:
    """All that the installed release has, if it is the table's, and those that it shares with it if not."""
    named = {row["family"] for row in RESULT["families"]}
    if RESULT["versions"]["transformers"] == transformers.__version__:
        assert named == set(FAMILIES)
    shared = named & set(FAMILIES)
    assert len(shared) > max(len(named), len(FAMILIES)) / 2, "the table is of a release long past"


def test_every_check_held() -> None:
    for row in RESULT["families"]:
        for column in COLUMNS:
            allowed = (None,) if row["family"] in NEVER_UNIFORM and row[column] is None else (True,)
            assert row[column] in allowed, (row["family"], column)


def test_page_is_made_from_the_result() -> None:
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert page == markdown(RESULT["families"], RESULT["versions"])
