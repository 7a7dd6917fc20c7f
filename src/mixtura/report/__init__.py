"""How things are shown: self-contained pages, tables, charts, sizes and times.

Pages need no network and no script. They follow the reader's light or dark setting, fit a phone,
print in light colours, and give every picture's numbers as a table too. All text is escaped: what
is not yet markup is `str`, what is markup is `Html`, and a type checker keeps the two apart.
"""

from __future__ import annotations

from mixtura.report.chart import Highlight, Limit, Series, line_svg
from mixtura.report.heatmap import Scale, category_map_svg, heatmap_svg
from mixtura.report.markup import Html, escape, join
from mixtura.report.numbers import counted, human_count, human_number, human_percent
from mixtura.report.page import Section, details, facts, note, page, paragraph
from mixtura.report.tables import side_by_side, table_html

__all__ = [
    "Highlight",
    "Html",
    "Limit",
    "Scale",
    "Section",
    "Series",
    "category_map_svg",
    "counted",
    "details",
    "escape",
    "facts",
    "heatmap_svg",
    "human_count",
    "human_number",
    "human_percent",
    "join",
    "line_svg",
    "note",
    "page",
    "paragraph",
    "side_by_side",
    "table_html",
]
