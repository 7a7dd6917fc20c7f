"""Counts, shares and measures as people read them; sizes and times are in `mixtura.report.units`."""

from __future__ import annotations

import math

Number = float | int

_COUNT_UNITS = ("", "k", "M", "B", "T")


def human_count(count: Number) -> str:
    """A count, from ten thousand on with a unit: thousand, million, billion, trillion.

    >>> human_count(9_999), human_count(16_300_000), human_count(671e9)
    ('9,999', '16.3 M', '671 B')
    """
    if not math.isfinite(count):
        return human_number(count)
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    scaled, unit = float(count), 0
    # A value that would be shown as a full next unit ("1000 k") is shown in that unit.
    while abs(scaled) >= 999.5 and unit < len(_COUNT_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f} {_COUNT_UNITS[unit]}"


def human_percent(share: Number) -> str:
    """A share of one as percent; what is not zero is never shown as zero.

    >>> human_percent(0.12), human_percent(0), human_percent(0.00001), human_percent(1)
    ('12.0 %', '0 %', '< 0.1 %', '100 %')
    """
    if not math.isfinite(share):
        return human_number(share)
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{share:.0%}".replace("%", " %") if share in (0, 1) else f"{100 * share:.1f} %"


def counted(count: int, thing: str) -> str:
    """A count with what it counts, in the plural unless it is one.

    >>> counted(1, "file"), counted(3, "file"), counted(12_000, "token")
    ('1 file', '3 files', '12,000 tokens')
    """
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def human_number(value: Number) -> str:
    """A number with three significant digits, without an exponent where it is short without.

    >>> human_number(0.012345), human_number(999.96), human_number(3.0), human_number(1e-9)
    ('0.0123', '1,000', '3', '1e-09')
    >>> human_number(float("nan")), human_number(float("inf"))
    ('–', '∞')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}"
