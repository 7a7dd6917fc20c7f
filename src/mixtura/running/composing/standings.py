"""Tables of standings as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any


def as_csv(table: Sequence[Any], form: str = ".5f") -> str:
    """Every number of some records of one dataclass, a line each; ``form`` is that of floats."""
    out = io.StringIO()
    rows = [asdict(one) for one in table]
    lines = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    for row in rows:
        lines.writerow({k: format(v, form) if isinstance(v, float) else v for k, v in row.items()})
    return out.getvalue()
