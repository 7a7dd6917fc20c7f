"""What analyses found, as sections of a page: sentences, numbers, pictures, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mixtura import __version__
from mixtura.methods import header
from mixtura.methods.analyses import Cell, Grid, Lines, Report, Table
from mixtura.report import (
    Html,
    Section,
    Series,
    facts,
    heatmap_svg,
    human_number,
    line_svg,
    page,
    paragraph,
    table_html,
)

_UNKNOWN = "–"
# Without pictures of its own an analysis gets a curve over the layers for each of its first columns.
_MOST_CURVES = 4


def findings_page(title: str, reports: Mapping[str, Report], *, summary: str = "") -> str:
    """A page of nothing but analyses."""
    return page(title, finding_sections(reports), summary=summary, footer=f"mixtura {__version__}")


def finding_sections(reports: Mapping[str, Report]) -> list[Section]:
    """A section for each analysis, by its name."""
    return [Section(_title(name), _blocks(name, one)) for name, one in reports.items()]


def shown(value: Cell) -> str:
    """A number or word as tables show it.

    >>> shown(None), shown(3), shown(0.123456), shown("top_k")
    ('–', '3', '0.1235', 'top_k')
    """
    if value is None:
        return _UNKNOWN
    if isinstance(value, str):
        return value
    return human_number(value) if isinstance(value, int) else f"{value:.4g}"


def _title(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".py").replace("_", " ").capitalize()


def _blocks(name: str, report: Report) -> list[Html]:
    told = header("analyses", name).summary
    blocks = [paragraph(told), *(paragraph(one) for one in report.sentences)]
    scalars = {key.replace("_", " "): shown(value) for key, value in report.scalars.items()}
    blocks.append(facts(scalars))
    blocks += [_drawn(one) for one in (report.figures or _curves(report))]
    if report.rows:
        columns = [one.replace("_", " ") for one in report.columns]
        rows = [[shown(row[one]) for one in report.columns] for row in report.rows]
        blocks.append(table_html(columns, rows, caption="By layer"))
    blocks += [_table(one) for one in report.tables]
    return blocks


def _curves(report: Report) -> list[Lines]:
    """A curve over the layers for each of the first columns that has numbers."""
    found = []
    for column in report.columns[1:]:
        points = [(row["layer"], row[column]) for row in report.rows]
        known = tuple((float(x), float(y)) for x, y in points if x is not None and y is not None)
        if len(known) > 1:
            name = column.replace("_", " ")
            found.append(Lines(title=f"{name} by layer", x_label="layer", y_label=name, series={name: known}))
    return found[:_MOST_CURVES]


def _drawn(figure: Lines | Grid) -> Html:
    if isinstance(figure, Grid):
        values = [[math.nan if value is None else value for value in row] for row in figure.values]
        return heatmap_svg(
            values,
            figure.row_labels,
            figure.column_labels,
            title=figure.title,
            row_name=figure.row_name,
            col_name=figure.column_name,
            scale="signed" if figure.signed else "linear",
            number_format=lambda value: shown(float(value)),
        )
    return line_svg(
        [Series(name, points, joined=figure.joined) for name, points in figure.series.items()],
        title=figure.title,
        x_label=figure.x_label,
        y_label=figure.y_label,
        log_x=figure.log_x,
        log_y=figure.log_y,
    )


def _table(table: Table) -> Html:
    rows = [[shown(value) for value in row] for row in table.rows]
    return table_html(list(table.columns), rows, caption=table.title)
