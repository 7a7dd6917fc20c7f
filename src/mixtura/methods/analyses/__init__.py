"""Numbers that say something about a model's routing, from what a pass over text saw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from mixtura.types.trace import Trace

KIND = {"base": "Analysis", "summary": "Says something about routing from a trace."}


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What an analysis found: numbers for the whole model, and a row of numbers per layer.

    Every row has the same columns; ``layer``, the decoder layer's number, is the first. Values are
    finite, or `None` where there is nothing to measure.
    """

    scalars: Mapping[str, float | None]
    rows: tuple[Mapping[str, float | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a row."""
        return tuple(self.rows[0]) if self.rows else ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"scalars": dict(self.scalars), "rows": [dict(row) for row in self.rows]}


class Analysis(ABC):
    """Says something about routing from what a pass over text saw.

    A method names the statistics it reads as tags (``"statistic:output_norm"``), and what else it
    needs recorded (``"needs:choices"``).
    """

    @abstractmethod
    def measure(self, trace: Trace) -> Report:
        """The numbers.

        Raises:
            UserError: the trace lacks what the analysis needs.
        """
