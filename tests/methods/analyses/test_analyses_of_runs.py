"""Analyses of tables find the law or the rule that made the table, and say what a table lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.analyses import Cell, Evidence
from mixtura.methods.analyses._gaussian import TRUTH, drawn, log_likelihood
from mixtura.methods.analyses.efficiency_leverage import EfficiencyLeverage
from mixtura.methods.analyses.gate_estimation import GateEstimation
from mixtura.methods.analyses.rational_strategies import RationalStrategies
from mixtura.methods.analyses.speedup_choice import SpeedupChoice

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


class TestGateEstimation:
    def test_the_likelihood_is_that_of_a_plain_computation(self) -> None:
        x, y = drawn(5, "activation", torch.Generator().manual_seed(0))
        total = 0.0
        for one, other in zip(x.tolist(), y.tolist(), strict=True):
            logit = TRUTH[0] * one + TRUTH[1] + TRUTH[2] * one * one
            pair = [1 / (1 + math.exp(-logit)) / math.exp(TRUTH[3]), 0.5 / math.exp(TRUTH[3])]
            shares = [math.exp(value) / sum(map(math.exp, pair)) for value in pair]
            spread = math.exp(TRUTH[8])
            normal = [
                math.exp(-0.5 * ((other - TRUTH[4 + i] * one - TRUTH[6 + i]) / spread) ** 2)
                / (spread * math.sqrt(2 * math.pi))
                for i in range(2)
            ]
            total += math.log(sum(a * b for a, b in zip(shares, normal, strict=True)))
        truth = torch.tensor(TRUTH, dtype=torch.float64)
        assert float(log_likelihood(truth, x, y, "activation")) == pytest.approx(total)

    def test_experts_are_learnt_at_the_parametric_rate(self) -> None:
        found = GateEstimation(sizes=[200, 3200], repeats=7).measure(Evidence()).scalars
        assert found["experts_activation"] == pytest.approx(-0.5, abs=0.3)
        assert found["slope_temperature"] is not None
        assert found["slope_activation"] is not None
        assert found["slope_temperature"] > found["slope_activation"] + 0.15
