"""The pages at ``/``: each one file, with everything in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import mixtura

# Nothing of other sites: a page has all that it needs.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_FOLDER = Path(__file__).parent
_STYLE = Path(mixtura.__file__).parent / "report" / "style.css"


@cache
def page(file: str = "dashboard.html") -> str:
    """A page of this folder, in the style of the reports."""
    text = (_FOLDER / file).read_text(encoding="utf-8")
    return text.replace("/* style of reports */", _STYLE.read_text(encoding="utf-8"))
