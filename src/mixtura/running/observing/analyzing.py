"""Analyses of a trace by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtura.methods import create
from mixtura.methods.analyses import Report
from mixtura.types.trace import Trace


def analyze(trace: Trace | str | Path, analysis: str, **settings: Any) -> Report:
    """What an analysis says of a trace, or of the file of one.

    >>> from mixtura.authoring.contracts import sample_trace
    >>> analyze(sample_trace(seed=0, num_experts=4), "load").scalars["dead"]
    0

    Raises:
        UnknownNameError: no such analysis.
        SettingError: a setting is unknown or out of range.
        UserError: the trace lacks what the analysis needs.
    """
    known = Trace.load(Path(trace)) if isinstance(trace, str | Path) else trace
    found: Report = create("analyses", analysis, **settings).measure(known)
    return found
