"""Losses compared in pairs, and results that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtura.train.arena.paired import Row, as_csv, judge, kept


def row(name: str, *losses: float) -> Row:
    return Row(name, runs=[{"loss": loss} for loss in losses])


def test_a_difference_beyond_its_interval_is_told_apart() -> None:
    reference = row("plain", 2.0, 3.0, 4.0)
    found = {}
    for name, losses in {
        "better": (1.9, 2.9, 3.91), "worse": (2.2, 3.2, 4.21), "not separated": (1.0, 3.5, 4.0)
    }.items():  # fmt: skip
        one = row(name, *losses)
        judge(one, reference)
        found[name] = one.verdict
    assert found == {name: name for name in found}


def test_the_interval_is_students() -> None:
    one = row("other", 1.0, 1.2)
    judge(one, row("plain", 1.0, 1.0))
    # Differences 0 and 0.2: mean 0.1, standard error 0.1, and 12.706 times that with one degree of freedom.
    assert one.difference == pytest.approx(0.1)
    assert one.half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)


def test_one_seed_decides_nothing() -> None:
    one = row("other", 1.0)
    judge(one, row("plain", 9.0))
    assert (one.half_width, one.verdict) == (None, "not separated")


def test_a_result_is_kept_for_its_terms_and_measured_anew_for_others(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"loss": float(len(calls))}

    file = tmp_path / "runs/one.json"
    assert kept(file, {"seed": 0}, measure) == kept(file, {"seed": 0}, measure) == {"loss": 1.0}
    assert kept(file, {"seed": 1}, measure) == {"loss": 2.0}
    file.write_text("{half")
    assert kept(file, {"seed": 1}, measure) == {"loss": 3.0}
    assert [path.name for path in file.parent.iterdir()] == ["one.json"]


def test_the_table_has_a_line_for_each_seed() -> None:
    lines = as_csv([row("a", 1.5, 2.5)], ("loss",)).splitlines()
    assert lines == ["group,name,seed,loss,verdict", ",a,0,1.5,baseline", ",a,1,2.5,baseline"]
