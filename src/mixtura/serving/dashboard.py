"""The page at ``/``: one file, with everything in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mixtura

_FOLDER = Path(__file__).parent
_STYLE = Path(mixtura.__file__).parent / "report" / "style.css"


@cache
def page() -> str:
    """The dashboard, in the style of the reports."""
    text = (_FOLDER / "dashboard.html").read_text(encoding="utf-8")
    return text.replace("/* style of reports */", _STYLE.read_text(encoding="utf-8"))
