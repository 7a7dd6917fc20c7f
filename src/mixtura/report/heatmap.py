"""Heat maps and category maps: rows by columns of coloured cells, such as layers by experts.

The cells are one small SVG that stretches to the page's width; labels keep their size. Colours are
classes of the style sheet, so that a map is legible on light and dark pages and in print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from mixtura.report.markup import Html, escape
from mixtura.report.numbers import Number, human_number
from mixtura.report.page import details
from mixtura.report.tables import table_html

Scale = Literal["linear", "ratio", "signed"]

NUM_LEVELS = 9
NUM_RATIO_LEVELS = 13
_LARGEST_DOUBLING = 3.0
_MOST_CELLS_WITH_TOOLTIPS = 1024
_MOST_CELLS_IN_TABLE = 4096
_MOST_COLUMN_LABELS = 10
_LABEL_HEIGHT = 15
_SMALLEST_COLUMN = 2.5


def heatmap_svg(
    values: Sequence[Sequence[Number]],
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    *,
    title: str,
    row_name: str = "layer",
    col_name: str = "expert",
    scale: Scale = "linear",
    low: Number | None = None,
    high: Number | None = None,
    number_format: Callable[[Number], str] = human_number,
    zero_label: str = "",
) -> Html:
    """A figure of coloured cells, with its legend and its numbers as a table folded beneath.

    Args:
        values: one row of numbers per row label; NaN leaves a cell empty. Rows may differ in length.
        row_labels: names of the rows.
        col_labels: names of the columns.
        title: what is shown; the figure's caption and its name for screen readers.
        row_name: what one row is.
        col_name: what one column is.
        scale: "linear" from `low` to `high`; "ratio" for values around 1, in doublings, from an
            eighth to eight times; "signed" for values around 0, the largest on both sides being as strong.
        low: value of the faintest colour of a linear scale; the smallest value if not given.
        high: value of the strongest colour; the largest value if not given.
        number_format: how tooltips, legend and table show a value.
        zero_label: if given, cells that are exactly 0 get a colour of their own with this name.
    """
    finite = [v for row in values for v in row if math.isfinite(v)]
    reach = max(map(abs, finite), default=0.0)
    bottom = min(finite, default=0.0) if low is None else low
    top = max(finite, default=1.0) if high is None else high

    def colour(value: Number) -> str | None:
        if math.isnan(value):
            return None
        if zero_label and value == 0:
            return "zero"
        if scale == "ratio":
            return f"d{_ratio_level(value)}"
        if scale == "signed":
            return f"d{_signed_level(value, reach)}"
        return f"s{_linear_level(value, bottom, top)}"

    classes = [[colour(value) for value in row] for row in values]
    shown = [[number_format(value) for value in row] for row in values]
    legend = _linear_legend(bottom, top, number_format)
    if scale != "linear":
        legend = _ratio_legend() if scale == "ratio" else _signed_legend(reach, number_format)
    if zero_label:
        legend = [("zero", zero_label), *legend]
    return _figure(classes, shown, (row_labels, col_labels), (row_name, col_name), title, legend)


def category_map_svg(
    cells: Sequence[Sequence[str]],
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    *,
    categories: Sequence[str],
    title: str,
    row_name: str = "layer",
    col_name: str = "expert",
) -> Html:
    """A figure of cells that each belong to a category, such as what was done to each expert.

    Args:
        cells: the category of each cell, by name; "" leaves a cell empty.
        row_labels: names of the rows.
        col_labels: names of the columns.
        categories: their names in order, at most nine; the first gets the faintest colour, so name
            "unchanged" first and the strongest change last.
        title: what is shown; the figure's caption and its name for screen readers.
        row_name: what one row is.
        col_name: what one column is.
    """
    step = (NUM_LEVELS - 1) / max(1, len(categories) - 1)
    colours = {name: f"s{round(number * step)}" for number, name in enumerate(categories)}
    classes = [[colours[cell] if cell else None for cell in row] for row in cells]
    legend = [(colours[name], name) for name in categories]
    return _figure(classes, cells, (row_labels, col_labels), (row_name, col_name), title, legend)


def _linear_level(value: Number, bottom: Number, top: Number) -> int:
    if top <= bottom:
        return 0
    share = (min(max(value, bottom), top) - bottom) / (top - bottom)
    return round(share * (NUM_LEVELS - 1))


def _ratio_level(value: Number) -> int:
    if value <= 0:
        return 0
    doublings = min(max(math.log2(value), -_LARGEST_DOUBLING), _LARGEST_DOUBLING)
    return round((doublings + _LARGEST_DOUBLING) / (2 * _LARGEST_DOUBLING) * (NUM_RATIO_LEVELS - 1))


def _signed_level(value: Number, reach: Number) -> int:
    share = min(max(value / reach, -1.0), 1.0) if reach else 0.0
    return round((share + 1) / 2 * (NUM_RATIO_LEVELS - 1))


def _signed_legend(reach: Number, number_format: Callable[[Number], str]) -> list[tuple[str, str]]:
    if not reach:
        return [("d6", number_format(0))]
    steps = range(0, NUM_RATIO_LEVELS, 3)
    return [(f"d{i}", number_format(reach * (2 * i / (NUM_RATIO_LEVELS - 1) - 1))) for i in steps]


def _ratio_legend() -> list[tuple[str, str]]:
    names = {0: "⅛ or less", 2: "¼", 4: "½", 6: "even (1×)", 8: "2×", 10: "4×", 12: "8× or more"}
    return [(f"d{level}", name) for level, name in names.items()]


def _linear_legend(
    bottom: Number, top: Number, number_format: Callable[[Number], str]
) -> list[tuple[str, str]]:
    if top <= bottom:
        return [("s0", number_format(bottom))]
    steps = range(0, NUM_LEVELS, 2)
    return [(f"s{i}", number_format(bottom + (top - bottom) * i / (NUM_LEVELS - 1))) for i in steps]


def _figure(
    classes: Sequence[Sequence[str | None]],
    shown: Sequence[Sequence[str]],
    labels: tuple[Sequence[str], Sequence[str]],
    names: tuple[str, str],
    title: str,
    legend: Sequence[tuple[str, str]],
) -> Html:
    row_labels, col_labels = labels
    num_rows, num_cols = len(row_labels), max(1, len(col_labels))
    row_height = 18 if num_rows <= 24 else 12 if num_rows <= 48 else 8
    description = f"{title}: {num_rows} rows ({names[0]}) by {len(col_labels)} columns ({names[1]})"
    swatches = "".join(
        f'<li><svg class=swatch aria-hidden=true><rect width="100%" height="100%" class={name}></rect></svg>'
        f"{escape(text)}</li>"
        for name, text in legend
    )
    height = num_rows * row_height
    drawn = _cells(classes, shown, labels, names, num_cols)
    axes = _row_axis(row_labels, row_height) + _column_axis(col_labels, height)
    gutter = 10 + 7 * max((len(label) for label in row_labels), default=1)
    return Html(
        f"<figure><figcaption>{escape(title)}</figcaption><ul class=legend>{swatches}</ul>"
        f'<div class="scroll map" role=region tabindex=0 aria-label="{escape(title)}">'
        f'<div style="padding-left:{gutter}px;min-width:{num_cols * _SMALLEST_COLUMN + gutter:.0f}px">'
        f'<svg class=plot width="100%" height="{height}" role=img aria-label="{escape(description)}">'
        f"{drawn}{axes}</svg></div></div>"
        f"<p class=axis>across: {escape(names[1])}, down: {escape(names[0])}</p>"
        f"{_numbers(shown, labels, names, title)}</figure>"
    )


def _cells(
    classes: Sequence[Sequence[str | None]],
    shown: Sequence[Sequence[str]],
    labels: tuple[Sequence[str], Sequence[str]],
    names: tuple[str, str],
    num_cols: int,
) -> str:
    """The coloured part in units of cells: small maps cell by cell with tooltips, large by colour."""
    num_rows = len(classes)
    gap = 0.08 if num_cols <= 64 else 0.0
    size = f"{1 - gap:g}"
    if num_rows * num_cols <= _MOST_CELLS_WITH_TOOLTIPS:

        def told(row: int, column: int) -> str:
            return f"{names[0]} {labels[0][row]}, {names[1]} {labels[1][column]}: {shown[row][column]}"

        parts = [
            f'<rect x="{column}" y="{row}" width="{size}" height="{size}" class={name}>'
            f"<title>{escape(told(row, column))}</title></rect>"
            for row, line in enumerate(classes)
            for column, name in enumerate(line)
            if name is not None
        ]
    else:
        squares: dict[str, list[str]] = {}
        for row, line in enumerate(classes):
            for column, name in enumerate(line):
                if name is not None:
                    squares.setdefault(name, []).append(f"M{column} {row}h{size}v{size}h-{size}z")
        parts = [f'<path class={name} d="{"".join(squares[name])}"></path>' for name in sorted(squares)]
    return (
        f'<svg width="100%" height="100%" viewBox="0 0 {num_cols} {num_rows}" preserveAspectRatio="none">'
        f"{''.join(parts)}</svg>"
    )


def _row_axis(row_labels: Sequence[str], row_height: int) -> str:
    every = math.ceil(_LABEL_HEIGHT / row_height)
    return "".join(
        f'<text x="-6" y="{row * row_height + row_height / 2:g}" text-anchor=end dominant-baseline=central>'
        f"{escape(row_labels[row])}</text>"
        for row in range(0, len(row_labels), every)
    )


def _column_axis(col_labels: Sequence[str], height: int) -> str:
    num_cols = len(col_labels)
    every = next((n for n in (1, 2, 4, 5, 8, 10, 16, 20) if num_cols <= n * _MOST_COLUMN_LABELS), 0)
    every = every or 2 ** math.ceil(math.log2(num_cols / _MOST_COLUMN_LABELS))
    return "".join(
        f'<text x="{100 * (column + 0.5) / num_cols:.2f}%" y="{height + 14}" text-anchor=middle>'
        f"{escape(col_labels[column])}</text>"
        for column in range(0, num_cols, every)
    )


def _numbers(
    shown: Sequence[Sequence[str]],
    labels: tuple[Sequence[str], Sequence[str]],
    names: tuple[str, str],
    title: str,
) -> Html:
    """The map's numbers as a table; left out where it would be larger than the page around it."""
    row_labels, col_labels = labels
    if len(row_labels) * len(col_labels) > _MOST_CELLS_IN_TABLE:
        return Html("")
    headers = [names[0], *(f"{names[1]} {label}" if i == 0 else label for i, label in enumerate(col_labels))]
    rows = [[label, *cells] for label, cells in zip(row_labels, shown, strict=True)]
    return details("The numbers as a table", table_html(headers, rows, caption=title))
