"""Curves and points on two axes, such as what each plan of a search costs and loses.

Everything is placed in percent of the plot, so that a chart fits any width while text, dots and
lines keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from mixtura.report.markup import Html, escape
from mixtura.report.numbers import Number, human_number
from mixtura.report.page import details
from mixtura.report.tables import table_html

NumberFormat = Callable[[Number], str]

# Series differ by shape as well as by colour.
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -5l5 8.5h-10z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M-5 -3.5h10l-5 8.5z",
    "M-1.5 -5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
)
_HEIGHT = 320
_MARGIN = 0.04
_TICKS = 5
_SPARSE_TICKS = 3


@final
@dataclass(frozen=True, slots=True)
class Series:
    """Points with one name; joined in order if `joined`, each with an optional name of its own."""

    name: str
    points: Sequence[tuple[Number, Number]]
    joined: bool = True
    labels: Sequence[str] = ()


@final
@dataclass(frozen=True, slots=True)
class Highlight:
    """A point to set apart, with its name written beside it."""

    x: Number
    y: Number
    label: str


@final
@dataclass(frozen=True, slots=True)
class Limit:
    """A value of the horizontal axis that is not to be passed: a line across the chart, with its name."""

    x: Number
    label: str


@final
@dataclass(frozen=True, slots=True)
class _Axis:
    """Where values of one axis are placed, and which are marked."""

    low: Number
    high: Number
    log: bool
    unit: Number = 1

    @staticmethod
    def over(values: Sequence[Number], log: bool, unit: Number = 1) -> _Axis:
        """An axis with a margin around the finite values (the positive ones on a log axis)."""
        usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(usable), max(usable)
        if low == high:
            around = (abs(low) or 1) / 2
            low, high = (low / 2, high * 2) if log else (low - around, high + around)
        if log:
            pad = (high / low) ** _MARGIN
            return _Axis(low / pad, high * pad, log, unit)
        pad = (high - low) * _MARGIN
        # A margin below zero would suggest values that cannot be.
        return _Axis(low - pad if low < 0 or low > 4 * pad else 0.0, high + pad, log, unit)

    def place(self, value: Number) -> float:
        """Percent of the axis; values below a log axis lie on its start."""
        if self.log:
            value = max(value, self.low)
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Values within the axis that are round when counted in its unit, about five."""
        inner = _Axis(self.low / self.unit, self.high / self.unit, self.log)
        return [tick * self.unit for tick in inner._round_values()]

    def _round_values(self) -> list[float]:
        if self.log and self.high / self.low >= 10:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            steps = (1.0,) if len(powers) > _SPARSE_TICKS else (1.0, 2.0, 5.0)
            found = [s * 10.0**p for p in range(powers.start - 1, powers.stop + 1) for s in steps]
            return [t for t in found if self.low <= t <= self.high]
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def line_svg(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    highlights: Sequence[Highlight] = (),
    limits: Sequence[Limit] = (),
    log_x: bool = False,
    log_y: bool = False,
    x_unit: Number = 1,
    x_format: NumberFormat = human_number,
    y_format: NumberFormat = human_number,
) -> Html:
    """A figure of curves or scattered points, with its numbers as a table folded beneath.

    Args:
        series: what is drawn, each with its own colour and shape.
        title: what is shown; the figure's caption and its name for screen readers.
        x_label: what the horizontal axis counts, with its unit.
        y_label: what the vertical axis counts, with its unit.
        highlights: points set apart with their names.
        limits: values of the horizontal axis drawn as lines from top to bottom, such as a budget.
        log_x: a logarithmic horizontal axis; values of 0 or less lie at its start.
        log_y: a logarithmic vertical axis.
        x_unit: marks of the horizontal axis are round when counted in this unit; `2**20` for MiB.
        x_format: how values of the horizontal axis are shown.
        y_format: how values of the vertical axis are shown.
    """
    points = [point for line in series for point in line.points] + [(h.x, h.y) for h in highlights]
    x_axis = _Axis.over([*(x for x, _ in points), *(limit.x for limit in limits)], log_x, x_unit)
    y_axis = _Axis.over([y for _, y in points], log_y)

    def place(x: Number, y: Number) -> tuple[float, float]:
        return x_axis.place(x), 100 - y_axis.place(y)

    def told(x: Number, y: Number) -> str:
        return f"{x_label} {x_format(x)}, {y_label} {y_format(y)}"

    drawn = [_grid(x_axis, y_axis, x_format, y_format)]
    drawn += [_limit(limit, x_axis, x_format) for limit in limits]
    drawn += [_drawn(line, number, place, told) for number, line in enumerate(series)]
    drawn += [_highlighted(h, place, told) for h in highlights]
    keys = "".join(
        f'<li><svg class=swatch aria-hidden=true viewBox="-7 -7 14 14">{_dot(number)}</svg>'
        f"{escape(line.name)}</li>"
        for number, line in enumerate(series)
    )
    rows = [
        [line.labels[i] if i < len(line.labels) else line.name, x_format(x), y_format(y)]
        for line in series
        for i, (x, y) in enumerate(line.points)
    ] + [[h.label, x_format(h.x), y_format(h.y)] for h in highlights]
    rows += [[limit.label, x_format(limit.x), "–"] for limit in limits]
    numbers = details("The numbers as a table", table_html(["", x_label, y_label], rows, caption=title))
    return Html(
        f"<figure><figcaption>{escape(title)}</figcaption><ul class=legend>{keys}</ul>"
        f"<p class=axis>up: {escape(y_label)}</p>"
        f'<div class=chart><svg class=plot width="100%" height="{_HEIGHT}" role=img '
        f'aria-label="{escape(f"{title}: {y_label} over {x_label}")}">{"".join(drawn)}</svg></div>'
        f'<p class="axis end">across: {escape(x_label)}</p>{numbers}</figure>'
    )


def _grid(x_axis: _Axis, y_axis: _Axis, x_format: NumberFormat, y_format: NumberFormat) -> str:
    parts = []
    for tick in x_axis.ticks():
        at = f"{x_axis.place(tick):.2f}%"
        parts.append(f'<line class=grid x1="{at}" x2="{at}" y1="0" y2="100%"></line>')
        parts.append(f'<text x="{at}" y="100%" dy="18" text-anchor=middle>{escape(x_format(tick))}</text>')
    for tick in y_axis.ticks():
        at = f"{100 - y_axis.place(tick):.2f}%"
        parts.append(f'<line class=grid x1="0" x2="100%" y1="{at}" y2="{at}"></line>')
        parts.append(
            f'<text x="-6" y="{at}" text-anchor=end dominant-baseline=central>{escape(y_format(tick))}</text>'
        )
    parts.append('<line class=axis-line x1="0" x2="100%" y1="100%" y2="100%"></line>')
    return "".join(parts)


Place = Callable[[Number, Number], tuple[float, float]]
Told = Callable[[Number, Number], str]


def _dot(number: int) -> str:
    return f'<path class="c{number % len(_SHAPES)}" d="{_SHAPES[number % len(_SHAPES)]}"></path>'


def _drawn(line: Series, number: int, place: Place, told: Told) -> str:
    spots = [(*place(x, y), x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    parts = []
    if line.joined:
        parts = [
            f'<line class="c{number % len(_SHAPES)}" x1="{a[0]:.2f}%" y1="{a[1]:.2f}%" x2="{b[0]:.2f}%" '
            f'y2="{b[1]:.2f}%"></line>'
            for a, b in pairwise(spots)
        ]
    for i, (left, top, x, y) in enumerate(spots):
        name = line.labels[i] if i < len(line.labels) else line.name
        parts.append(
            f'<svg x="{left:.2f}%" y="{top:.2f}%" overflow=visible>'
            f"<title>{escape(f'{name}: {told(x, y)}')}</title>{_dot(number)}</svg>"
        )
    return "".join(parts)


def _limit(limit: Limit, x_axis: _Axis, x_format: NumberFormat) -> str:
    at = x_axis.place(limit.x)
    side, anchor = ("-6", "end") if at > 50 else ("6", "start")
    name = escape(f"{limit.label} {x_format(limit.x)}")
    return (
        f'<g class=limit><title>{name}</title><line x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"></line>'
        f'<text x="{at:.2f}%" y="0" dx="{side}" dy="12" text-anchor={anchor}>{name}</text></g>'
    )


def _highlighted(spot: Highlight, place: Place, told: Told) -> str:
    if not (math.isfinite(spot.x) and math.isfinite(spot.y)):
        return ""
    left, top = place(spot.x, spot.y)
    side, anchor = (-13, "end") if left > 50 else (13, "start")
    drop = 16 if top < 10 else -10
    return (
        f'<svg x="{left:.2f}%" y="{top:.2f}%" overflow=visible class=highlight>'
        f"<title>{escape(f'{spot.label}: {told(spot.x, spot.y)}')}</title><circle r=8></circle>"
        f'<text x="{side}" y="{drop}" text-anchor={anchor}>{escape(spot.label)}</text></svg>'
    )
