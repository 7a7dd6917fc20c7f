"""The arena of upcyclers, a few steps of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtura.errors import UnknownNameError
from mixtura.fitting.upcycling.arena.models import Steps
from mixtura.fitting.upcycling.arena.page import markdown, picture
from mixtura.fitting.upcycling.arena.run import DENSE, MEAN, SCRATCH, Contest, hold


def test_methods_begin_where_they_promise_and_go_on_from_kept_results(tmp_path: Path) -> None:
    steps = Steps(dense=3, special=3, further=3)
    contest = Contest(
        only=("copies", "router_upcycling", "prompt_gates"), num_seeds=1, steps=steps, runs=tmp_path
    )
    said: list[str] = []
    rows = {row.name: row for row in hold(contest, said.append)}
    assert set(rows) == {DENSE, SCRATCH, MEAN, "copies", "router_upcycling", "prompt_gates"}
    # Alike experts are the dense model, in an ordinary family and in one of mixtura's own.
    dense = rows[DENSE].runs[0]["start"]
    assert rows["copies"].runs[0]["start"] == pytest.approx(dense, abs=1e-4)
    assert rows["router_upcycling"].runs[0]["start"] == pytest.approx(dense, abs=1e-4)
    assert rows[SCRATCH].runs[0]["start"] != pytest.approx(dense, abs=1e-3)
    assert all(row.runs[0]["loss"] < row.runs[0]["start"] for row in rows.values())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "upcyclers").glob("*.json")}
    again = hold(contest, said.append)
    assert [row.runs for row in again] == [rows[row.name].runs for row in again]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    page = markdown(again, 1, steps, "Here.")
    assert "Of 2 methods 0 are better than *dense, trained on*, 0 are worse, and 2 are not separated" in page
    assert picture(again).startswith("<svg")


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'copies'"):
        hold(Contest(only=("copie",), runs=tmp_path), print)
