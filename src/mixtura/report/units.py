"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

from mixtura.errors import SettingError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_bytes(text: str) -> int:
    """Bytes from a size: ``24GiB`` counts in powers of 1024, ``24GB`` in powers of 1000.

    >>> parse_bytes("24MB"), parse_bytes("1.5GiB"), parse_bytes("4096")
    (24000000, 1610612736, 4096)

    Raises:
        SettingError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise SettingError(f"{text!r} is not a size; write a number with a unit, such as 24GiB or 500MB")
    scale = (_BINARY if match[3] else _DECIMAL)[match[2].upper()]
    size = int(float(match[1]) * scale)
    if size <= 0:
        raise SettingError(f"a size must be more than 0 bytes, got {text!r}")
    return size


def parse_seconds(text: str) -> float:
    """Seconds from a time such as ``90s``, ``30m``, ``1.5h`` or ``1h30m``.

    >>> parse_seconds("30m"), parse_seconds("1h30m"), parse_seconds("45")
    (1800.0, 5400.0, 45.0)

    Raises:
        SettingError: the text is not a positive time.
    """
    stripped = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", stripped):
        stripped += "s"
    if not re.fullmatch(r"(\d+(\.\d+)?[smh])+", stripped):
        raise SettingError(f"{text!r} is not a time; write it as 90s, 30m or 1h30m")
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", stripped)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise SettingError(f"a time must be more than 0 seconds, got {text!r}")
    return seconds


def format_bytes(num_bytes: float | int) -> str:
    """A size for people, in powers of 1024.

    >>> format_bytes(512), format_bytes(3 * 2**20), format_bytes(24.5 * 2**30)
    ('512 B', '3.0 MiB', '24.5 GiB')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float | int) -> str:
    """A time for people.

    >>> format_seconds(4.2), format_seconds(75), format_seconds(5400)
    ('4.2 s', '1 min 15 s', '1 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
