"""What the analysis efficiency_leverage promises beyond its kind's contract."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from mixtura.errors import UserError
from mixtura.methods.analyses import Cell, Evidence
from mixtura.methods.analyses.efficiency_leverage import EfficiencyLeverage

Rows = tuple[Mapping[str, Cell], ...]


def runs(rows: Rows) -> Evidence:
    return Evidence(runs=rows)


def without(rows: Rows, name: str) -> Rows:
    return tuple({key: value for key, value in row.items() if key != name} for row in rows)


class TestEfficiencyLeverage:
    def test_the_planted_law_is_found(self) -> None:
        """The example's law: an exponent of -0.6, -0.01 a log of compute, -0.16 and 0.04 of granularity."""
        found = EfficiencyLeverage().measure(runs(EfficiencyLeverage.example)).scalars
        assert found["dense_exponent"] == pytest.approx(-0.07)
        assert [found[name] for name in "adbc"] == pytest.approx([-0.6, -0.01, -0.16, 0.04], abs=1e-6)
        assert found["floor"] == pytest.approx(0, abs=1e-6)
        assert found["best_granularity"] == pytest.approx(math.exp(2))

    def test_a_dense_model_saves_nothing_and_a_planted_leverage_is_read(self) -> None:
        """A model that loses as little as a dense one of five times its compute has a leverage of 5."""
        dense = [
            {"flops": c, "loss": 40 * c**-0.05, "activation": 1.0, "granularity": 1.0} for c in (1e18, 1e20)
        ]
        moe = [
            {"flops": 1e19, "loss": 40 * 5e19**-0.05, "activation": 0.1, "granularity": float(g)}
            for g in range(2, 9)
        ]
        report = EfficiencyLeverage().measure(runs((*dense, *moe)))
        assert [row[4] for row in report.tables[0].rows] == pytest.approx([5.0] * 7)

    def test_what_the_table_lacks_is_said(self) -> None:
        rows = EfficiencyLeverage.example
        with pytest.raises(UserError, match="no column 'loss'; did you mean"):
            EfficiencyLeverage().measure(runs(tuple({**row, "los": 1.0} for row in without(rows, "loss"))))
        with pytest.raises(UserError, match="dense rows"):
            EfficiencyLeverage().measure(runs(tuple(row for row in rows if row["activation"] != 1.0)))
        with pytest.raises(
            UserError, match="loss must be a positive number in every row of the table, got 'x'"
        ):
            EfficiencyLeverage().measure(runs(tuple({**row, "loss": "x"} for row in rows)))
        with pytest.raises(UserError, match="does not fall"):
            EfficiencyLeverage().measure(runs(tuple({**row, "loss": row["flops"]} for row in rows)))
