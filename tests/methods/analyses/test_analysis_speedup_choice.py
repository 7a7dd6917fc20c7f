"""What the analysis speedup_choice promises beyond its kind's contract."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mixtura.errors import UserError
from mixtura.methods.analyses import Cell, Evidence
from mixtura.methods.analyses.speedup_choice import SpeedupChoice

Rows = tuple[Mapping[str, Cell], ...]


def runs(rows: Rows) -> Evidence:
    return Evidence(runs=rows)


def without(rows: Rows, name: str) -> Rows:
    return tuple({key: value for key, value in row.items() if key != name} for row in rows)


class TestSpeedupChoice:
    def test_the_planted_rule_costs_nothing(self) -> None:
        found = SpeedupChoice(ridge=0.01).measure(runs(SpeedupChoice.example))
        assert found.scalars["regret"] == 0
        assert found.scalars["regret_of_average"] is not None
        assert found.scalars["regret_of_average"] > 0.1
        assert found.scalars["cases"] == 9

    def test_regrets_of_the_average_and_of_chance_are_those_of_plain_counting(self) -> None:
        """Two cases a model: the average is won by b, which is wrong in one of them."""
        table = {("x", 1): (4.0, 1.0), ("x", 2): (1.0, 8.0), ("y", 1): (4.0, 1.0), ("y", 2): (1.0, 8.0)}
        rows = tuple(
            {"model": model, "num_tokens": size, "name": name, "tokens_per_s": value}
            for (model, size), pair in table.items()
            for name, value in zip("ab", pair, strict=True)
        )
        found = SpeedupChoice().measure(runs(rows)).scalars
        assert found["regret_of_average"] == pytest.approx((0.75 + 0.0) / 2, abs=0.07)
        assert found["regret_of_chance"] == pytest.approx((0.75 / 2 + 0.875 / 2) / 2)

    def test_smaller_is_better_where_it_is_said(self) -> None:
        rows = tuple({**row, "ms": 1000 / float(str(row["tokens_per_s"]))} for row in SpeedupChoice.example)
        rows = without(rows, "tokens_per_s")
        found = SpeedupChoice(score="ms", smaller=True, ridge=0.01, case=["model=one", "num_tokens=256"])
        report = found.measure(runs(rows))
        assert report.scalars["regret"] == 0
        assert report.tables[1].rows[0][0] == "wide"

    def test_what_is_missing_is_said(self) -> None:
        with pytest.raises(UserError, match="1 values of model"):
            SpeedupChoice().measure(runs(tuple({**row, "model": "one"} for row in SpeedupChoice.example)))
        with pytest.raises(UserError, match="no feature 'modle'; did you mean 'model'"):
            SpeedupChoice(case=["modle=one"]).measure(runs(SpeedupChoice.example))
