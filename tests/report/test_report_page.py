"""Report pages: parsed, self-contained, escaped, readable without pictures."""

from __future__ import annotations

import re

import pytest
from report_pages import assert_self_contained, parsed

from mixtura.report import (
    Highlight,
    Section,
    Series,
    category_map_svg,
    details,
    facts,
    heatmap_svg,
    line_svg,
    note,
    page,
    paragraph,
    side_by_side,
    table_html,
)


def example() -> str:
    values = [[0.0, 0.5, 1.0], [float("nan"), 2.0, float("inf")]]
    return page(
        "A <title> & more",
        [
            Section("First", [facts({"a": "1"}), note("n"), paragraph("<script>alert(1)</script>")]),
            Section(
                "First", [heatmap_svg(values, ["0", "1"], ["a", "b", "c"], title="map", zero_label="none")]
            ),
            Section("Maps", [category_map_svg([["x", ""]], ["r"], ["a", "b"], categories=["x"], title="t")]),
            Section(
                "Curves",
                [
                    line_svg(
                        [Series("s", [(1, 2), (3, 0)]), Series("t", [(2, 5)], joined=False, labels=["one"])],
                        title="curve",
                        x_label="x",
                        y_label="y",
                        highlights=[Highlight(2, 3, "chosen")],
                        log_y=True,
                    )
                ],
            ),
            Section(
                "Texts", [side_by_side([("a", "1 < 2"), ("b", "\x00\ud800")]), details("more", note("m"))]
            ),
        ],
        summary="quotes \" and '",
        footer="the end",
    )


def test_page_is_well_formed_and_needs_nothing_else() -> None:
    html = example()
    assert_self_contained(html)
    html.encode("utf-8")


def test_page_says_its_language_title_and_width() -> None:
    checker = parsed(example())
    assert ("html", {"lang": "en"}) in checker.seen
    assert any(tag == "meta" and attrs.get("name") == "viewport" for tag, attrs in checker.seen)
    assert "A <title> & more" in checker.text
    headings = [tag for tag, _ in checker.seen if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_all_text_is_escaped() -> None:
    html = example()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_sections_of_one_name_have_anchors_of_their_own() -> None:
    ids = re.findall(r'<section id="([^"]+)"', example())
    assert ids == ["first", "first-2", "maps", "curves", "texts"]


def test_every_picture_has_a_name_and_its_numbers_as_a_table() -> None:
    checker = parsed(example())
    pictures = [attrs for tag, attrs in checker.seen if tag == "svg" and attrs.get("role") == "img"]
    assert len(pictures) == 3
    assert all(attrs["aria-label"] for attrs in pictures)
    figures = example().split("<figure>")[1:]
    assert all("<table" in figure for figure in figures)


def test_heat_map_colours_by_value() -> None:
    html = heatmap_svg([[0.0, 5.0, 10.0]], ["0"], ["a", "b", "c"], title="t")
    assert re.findall(r'<rect x="\d" [^>]*class=(\w+)>', html) == ["s0", "s4", "s8"]
    ratio = heatmap_svg([[0.0, 0.01, 0.5, 1.0, 2.0, 100.0]], ["0"], list("abcdef"), title="t", scale="ratio",
                        zero_label="never")  # fmt: skip
    assert re.findall(r'<rect x="\d" [^>]*class=(\w+)>', ratio) == ["zero", "d0", "d4", "d6", "d8", "d12"]
    assert "never" in ratio


def test_heat_map_leaves_missing_values_empty() -> None:
    html = heatmap_svg([[1.0, float("nan")], [2.0]], ["0", "1"], ["a", "b"], title="t")
    assert html.count("<title>") == 2


def test_large_heat_map_stays_small_and_draws_every_cell() -> None:
    rows, cols = 61, 256
    values = [[float((r * cols + c) % 7) for c in range(cols)] for r in range(rows)]
    html = heatmap_svg(values, [str(r) for r in range(rows)], [str(c) for c in range(cols)], title="t")
    assert_self_contained(html)
    drawn = re.findall(r"M(\d+) (\d+)h", html)
    assert len(drawn) == rows * cols
    assert len(set(drawn)) == rows * cols
    assert len(html) < 500_000


def test_categories_have_colours_in_order() -> None:
    html = category_map_svg(
        [["kept", "4 bit", "dropped"]],
        ["0"],
        ["a", "b", "c"],
        categories=["kept", "4 bit", "dropped"],
        title="t",
    )
    assert re.findall(r'<rect x="\d" [^>]*class=(\w+)>', html) == ["s0", "s4", "s8"]


def test_curve_places_points_in_percent() -> None:
    html = line_svg([Series("s", [(0, 0), (10, 10)])], title="t", x_label="x", y_label="y")
    spots = [(float(x), float(y)) for x, y in re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)%" overflow', html)]
    assert spots[0] == (0.0, 100.0)
    assert 90 < spots[1][0] < 100
    assert 0 < spots[1][1] < 10


def test_log_axis_marks_powers_and_keeps_zero_on_the_plot() -> None:
    points = [(1.0, 0.0), (2.0, 1e-3), (3.0, 10.0)]
    html = line_svg([Series("s", points)], title="t", x_label="x", y_label="y", log_y=True)
    for mark in ("0.001", "0.01", "0.1", "1", "10"):
        assert f">{mark}</text>" in html
    tops = [float(y) for y in re.findall(r'<svg x="[\d.]+%" y="([\d.]+)%" overflow', html)]
    assert all(0 <= top <= 100 for top in tops)


def test_marks_are_round_in_the_unit_given() -> None:
    html = line_svg(
        [Series("s", [(0, 0), (40 * 2**20, 1)])],
        title="t",
        x_label="x",
        y_label="y",
        x_unit=2**20,
        x_format=lambda value: f"{value / 2**20:g} MiB",
    )
    assert ">10 MiB</text>" in html


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(0.0, 0.0)], [(float("nan"), float("inf"))]])
@pytest.mark.parametrize("log", [False, True])
def test_curves_of_few_points_are_drawn(points: list[tuple[float, float]], log: bool) -> None:
    html = line_svg([Series("s", points)], title="t", x_label="x", y_label="y", log_x=log, log_y=log)
    assert_self_contained(html)


def test_numbers_are_aligned_right_and_rows_are_named() -> None:
    html = table_html(["layer", "name", "share"], [["0", "a", "< 0.1 %"], ["1", "b", "–"]], highlight=[1])
    assert "<th scope=col class=n>share" in html
    assert "<th scope=col>name" in html
    assert "<tr class=chosen><th scope=row class=n>1" in html


def test_a_signed_map_has_nothing_in_the_middle() -> None:
    html = heatmap_svg([[-2.0, 0.0, 1.0]], ["0"], ["a", "b", "c"], title="Signed", scale="signed")
    assert [f"class={level}" in html for level in ("d0", "d6", "d9", "d12")] == [True] * 4
    assert html.count("class=d12") == 1  # in the legend alone
    assert "class=d6" in heatmap_svg([[0.0]], ["0"], ["a"], title="Nothing", scale="signed")
