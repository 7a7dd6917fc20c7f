"""Quality against cost as a picture: an SVG with named points that stands by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1080, 760
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 64, 64
_FONT = 11
_CHAR = 6.7
_COLOURS = {
    "better": "#1a7f37",
    "worse": "#b42318",
    "not separated": "#6b7280",
    "not comparable": "#9a6700",
    "reference": "#1d4ed8",
}
_ANGLES = 16


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """What quality is plotted against: a mean of every entry by its key, in words, and with its unit."""

    key: str
    what: str
    label: str


_TIME = Axis("time_ratio", "time", "time of a forward pass, plain top-k = 1")
# What a kind is for, where that is not its cost: balancers take next to no time in a forward pass.
_AXES = {
    "balancers": Axis(
        "max_over_mean", "balance", "load of the fullest expert over the mean, worst layer (1 is even)"
    )
}


def axis_of(kind: str) -> Axis:
    """What the entries of a kind are plotted against."""
    return _AXES.get(kind, _TIME)


@final
@dataclass(frozen=True, slots=True)
class Point:
    """A named point with half the height of its interval; ``group`` sets its colour and shape."""

    name: str
    x: float
    y: float
    half_height: float
    group: str
    baseline: bool = False
    hollow: bool = False


@final
@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle on the picture that a label must not cover."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        """Whether the two overlap."""
        apart = self.right < other.left or other.right < self.left
        return not (apart or self.bottom < other.top or other.bottom < self.top)


def scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """The picture; the horizontal axis is logarithmic where the largest is many times the smallest."""
    xs, ys = [p.x for p in points], [v for p in points for v in (p.y - p.half_height, p.y + p.half_height)]
    log = max(xs) > 1.8 * min(xs) > 0
    across = _Axis.over(xs, LEFT, WIDTH - RIGHT, log)
    down = _Axis.over(ys, HEIGHT - BOTTOM, TOP, False)
    placed = [(p, across.place(p.x), down.place(p.y)) for p in points]
    parts = [*_frame(across, down, title, x_label, y_label), *_legend(points)]
    parts += [mark for p, x, y in placed for mark in _mark(p, x, y, down)]
    parts += _labels(placed)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="{_FONT}">'
    )
    return (
        "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *parts, "</svg>"])
        + "\n"
    )


@final
@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to places on the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, log: bool) -> _Axis:
        """An axis with a margin around the values."""
        low, high = min(values), max(values)
        if log:
            pad = (high / low) ** 0.06
            return _Axis(low / pad, high * pad, start, end, True)
        pad = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        return _Axis(low - pad, high + pad, start, end, False)

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            choices = [m * 10.0**p for p in range(-3, 5) for m in (1, 1.5, 2, 3, 5, 7)]
            return [c for c in choices if self.low <= c <= self.high]
        rough = (self.high - self.low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _frame(across: _Axis, down: _Axis, title: str, x_label: str, y_label: str) -> Iterator[str]:
    yield _text(LEFT, 28, title, size=16, weight="600")
    for value in across.ticks():
        x = across.place(value)
        yield f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eef0f3"/>'
        yield _text(x, HEIGHT - BOTTOM + 18, f"{value:g}", anchor="middle", colour="#4b5563")
    for value in down.ticks():
        y = down.place(value)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#eef0f3"/>'
        yield _text(LEFT - 8, y + 4, f"{value:.4g}", anchor="end", colour="#4b5563")
    yield f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#9ca3af" fill="none"/>'
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18, x_label, anchor="middle", size=12)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield (
        f'<text transform="translate(20 {middle:.0f}) rotate(-90)" text-anchor="middle" font-size="12" '
        f'fill="#111827">{escape(y_label)}</text>'
    )


def _legend(points: Sequence[Point]) -> Iterator[str]:
    """What colours and shapes mean, of those that there are."""
    x, groups = float(LEFT), {point.group for point in points}
    for group in (one for one in _COLOURS if one in groups):
        yield f'<circle cx="{x + 5:.0f}" cy="46" r="4.5" fill="{_COLOURS[group]}"/>'
        yield _text(x + 15, 50, group, colour="#374151")
        x += 34 + _CHAR * len(group)
    baseline, hollow = (any(getattr(point, kind) for point in points) for kind in ("baseline", "hollow"))
    for used, square, name in ((baseline, True, "baseline"), (hollow, False, "sees later tokens")):
        if used:
            yield _shape(x + 5, 46, "#6b7280", square=square, hollow=not square)
            yield _text(x + 15, 50, name, colour="#374151")
            x += 34 + _CHAR * len(name)


def _mark(point: Point, x: float, y: float, down: _Axis) -> Iterator[str]:
    colour = _COLOURS.get(point.group, "#6b7280")
    if point.half_height:
        top, low = down.place(point.y + point.half_height), down.place(point.y - point.half_height)
        yield f'<path d="M{x:.1f} {top:.1f}V{low:.1f}" stroke="{colour}" stroke-opacity="0.35"/>'
    yield _shape(x, y, colour, square=point.baseline, hollow=point.hollow)


def _shape(x: float, y: float, colour: str, *, square: bool, hollow: bool) -> str:
    fill = f'fill="#ffffff" stroke="{colour}" stroke-width="1.6"' if hollow else f'fill="{colour}"'
    if square:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {fill}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {fill}/>'


def _labels(placed: Sequence[tuple[Point, float, float]]) -> Iterator[str]:
    """Names beside their points, moved out along a line where it is crowded."""
    taken = [_Box(x - 5, y - 5, x + 5, y + 5) for _, x, y in placed]
    for point, x, y in sorted(placed, key=lambda one: (one[1], one[2])):
        box, anchor = _free(point.name, x, y, taken)
        taken.append(box)
        at = box.left if anchor == "start" else box.right
        middle = (box.top + box.bottom) / 2
        if math.hypot(at - x, middle - y) > 14:
            yield f'<path d="M{x:.1f} {y:.1f}L{at:.1f} {middle:.1f}" stroke="#9ca3af" stroke-width="0.6"/>'
        weight = "700" if point.group == "reference" else "400"
        yield _text(at, box.bottom - 3, point.name, anchor=anchor, weight=weight)


def _free(name: str, x: float, y: float, taken: Sequence[_Box]) -> tuple[_Box, str]:
    """The nearest place for a label that covers nothing; else the first."""
    width, height = _CHAR * len(name) + 2, _FONT + 2.0
    first: tuple[_Box, str] | None = None
    for radius in range(9, 260, 9):
        for number in range(_ANGLES):
            angle = 2 * math.pi * number / _ANGLES
            at_x, at_y = x + radius * math.cos(angle), y + radius * math.sin(angle)
            anchor = "start" if math.cos(angle) >= 0 else "end"
            left = at_x if anchor == "start" else at_x - width
            box = _Box(left, at_y - height / 2, left + width, at_y + height / 2)
            first = first or (box, anchor)
            inside = (
                box.left > LEFT and box.right < WIDTH and box.top > TOP - 8 and box.bottom < HEIGHT - BOTTOM
            )
            if inside and not any(box.meets(other) for other in taken):
                return box, anchor
    assert first is not None
    return first


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = _FONT,
    weight: str = "400",
    colour: str = "#111827",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
