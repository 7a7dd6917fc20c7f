"""Lines that mark a limit on a chart, columns that are set apart, and a fit's page that uses both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixtura.fitting.records import Candidate, Measured, Quality
from mixtura.fitting.report import report_html
from mixtura.fitting.result import Fitted, Row
from mixtura.report import Limit, Series, line_svg, table_html
from mixtura.train.arena.plot import axis_of


def places(svg: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, svg)]


def test_a_limit_stands_where_its_value_is_on_the_axis() -> None:
    points = [(10.0, 1.0), (20.0, 2.0), (40.0, 3.0)]
    svg = line_svg(
        [Series("s", points, joined=False)],
        title="t",
        x_label="x",
        y_label="y",
        limits=[Limit(30.0, "budget")],
    )
    (at,) = places(svg, r'<g class=limit>.*?<line x1="([\d.]+)%"')
    dots = places(svg, r'<svg x="([\d.]+)%" y="[\d.]+%" overflow=visible><title>s')
    assert at == pytest.approx((dots[1] + dots[2]) / 2, abs=0.02)
    assert "<title>budget 30</title>" in svg


def test_a_limit_beyond_all_points_widens_the_axis() -> None:
    svg = line_svg(
        [Series("s", [(1.0, 1.0), (2.0, 2.0)])], title="t", x_label="x", y_label="y", limits=[Limit(9.0, "l")]
    )
    (at,) = places(svg, r'<g class=limit>.*?<line x1="([\d.]+)%"')
    assert 50 < at < 100


def test_a_column_is_set_apart_in_every_row() -> None:
    table = table_html(["", "a", "b"], [["x", "1", "2"], ["y", "3", "4"]], highlight_columns=[2])
    assert table.count("chosen") == 3
    assert '<td class="n chosen">2</td>' in table
    assert "<td class=n>1</td>" in table


def quality(kl: float) -> Quality:
    return Quality(
        kl=kl,
        kl_low=kl / 2,
        kl_high=2 * kl,
        equal_top=0.975,
        perplexity={"all": 12.5},
        kl_by_domain={"all": kl},
        num_tokens=321,
    )


def row(name: str, label: str, size: int, kl: float) -> Row:
    return Row(
        name=name,
        label=label,
        weights_bytes=size,
        accounted_bytes=2 * size,
        active_bytes=size / 4,
        quality=quality(kl),
        tokens_per_second=100.0,
        peak_bytes=3 * size,
    )


def made() -> Fitted:
    rows = (
        row("before", "", 64 << 20, 0.0),
        row("uniform", "uniform 4 bit", 16 << 20, 0.01),
        row("chosen", "mixed widths", 20 << 20, 0.002),
    )
    tried = Measured(
        candidate=Candidate("mixed widths", (1, 2)),
        expert_bytes=1 << 20,
        account_bytes=40 << 20,
        active_bytes=1.0,
        quality=quality(0.002),
    )
    return Fitted(
        model="m",
        out=Path("out"),
        budget_bytes=48 << 20,
        budget_kind="model",
        model_budget_bytes=48 << 20,
        runtime_bytes=100 << 20,
        context=64,
        plan=None,
        rows=rows,
        tried=(tried,),
        choice_map={"0": ("8 bit", "4 bit")},
        left_out=("even drops",),
        notes=("the context is 64 tokens",),
    )


def test_a_fits_page_has_a_column_for_each_model_and_a_line_at_the_budget() -> None:
    page = report_html(made())
    head = re.search(r'<table aria-label="The models"><thead><tr>(.*?)</tr>', page)
    assert head is not None
    names = re.findall(r"<th[^>]*>([^<]*)</th>", head[1])
    assert names == ["model", "before", "uniform 4 bit", "chosen: mixed widths"]
    assert "<title>budget 48.0 MiB</title>" in page


def test_what_was_left_out_and_not_done_as_asked_is_on_the_page_and_in_the_json() -> None:
    fitted = made()
    told = fitted.to_dict()
    assert told["left_out"] == ["even drops"]
    assert told["out_of_time"] is True
    for remark in told["notes"]:
        assert remark in report_html(fitted)
    assert any("left out: even drops" in remark for remark in told["notes"])
    assert "the context is 64 tokens" in told["notes"]


def test_balancers_are_plotted_against_balance() -> None:
    assert axis_of("balancers").key == "max_over_mean"
    assert axis_of("routers").key == axis_of("mixers").key == "time_ratio"
