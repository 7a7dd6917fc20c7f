"""Every device sends to every other at once."""

from __future__ import annotations

from typing import final

from mixtura.methods.exchanges import Exchange, Hop

METHOD = {"paper": None, "title": "One all-to-all"}


@final
class Flat(Exchange):
    """Send each token straight to its expert's device: one all-to-all of as many rows as there are.

    Splits are uneven; nothing is padded or dropped.

    Shapes:
        A row for each assignment.

    Example:
        >>> Flat().hops()
        ('all',)
    """

    def hops(self) -> tuple[Hop, ...]:
        return ("all",)
