"""What the analysis rational_strategies promises beyond its kind's contract."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from mixtura.errors import UserError
from mixtura.methods.analyses import Cell, Evidence
from mixtura.methods.analyses.rational_strategies import RationalStrategies

Rows = tuple[Mapping[str, Cell], ...]


def runs(rows: Rows) -> Evidence:
    return Evidence(runs=rows)


def without(rows: Rows, name: str) -> Rows:
    return tuple({key: value for key, value in row.items() if key != name} for row in rows)


class TestRationalStrategies:
    def test_the_planted_numbers_are_found_in_noise(self) -> None:
        generator = np.random.default_rng(0)
        rows = []
        for row in RationalStrategies.example:
            assert isinstance(row["distance_generalizing"], float)
            share = min(max(row["distance_generalizing"] + generator.normal(0, 0.01), 0.0), 1.0)
            rows.append({**row, "distance_generalizing": share, "distance_memorizing": 1 - share})
        found = RationalStrategies().measure(runs(tuple(rows))).scalars
        assert [found[n] for n in ("alpha", "beta", "gamma")] == pytest.approx([0.5, 0.3, 2.0], rel=0.15)
        assert found["error"] is not None
        assert found["error"] < 0.02

    def test_more_tasks_go_over_later_and_by_more_than_their_number(self) -> None:
        table = RationalStrategies().measure(runs(RationalStrategies.example)).tables[0]
        steps = [row[1] for row in table.rows]
        assert isinstance(steps[1], float)
        assert isinstance(steps[2], float)
        assert steps[2] / steps[1] > 1

    def test_what_the_table_lacks_is_said(self) -> None:
        with pytest.raises(UserError, match="'complexity_memorizing'"):
            RationalStrategies().measure(runs(without(RationalStrategies.example, "complexity_memorizing")))
