"""What a recorded trace says of a model's experts, by the numbers that its layers have here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from mixtura.errors import UserError
from mixtura.types.trace import Trace


@final
@dataclass(frozen=True, slots=True)
class Lesson:
    """How often experts were chosen, and followed by those of the next layer; layers are numbered from 0."""

    counts: Mapping[int, Sequence[float]]
    pairs: Mapping[int, Sequence[Sequence[float]]]

    @staticmethod
    def of(trace: Trace, num_experts: Sequence[int]) -> Lesson:
        """The lesson of a trace for a model with so many experts in each layer.

        Raises:
            UserError: the trace is of another model.
        """
        seen = [layer.shape.num_experts for layer in trace.layers]
        if seen != [*num_experts]:
            raise UserError(
                f"the trace is of another model: it has {len(seen)} layers of {_range(seen)} experts, and "
                f"this model {len(num_experts)} of {_range(num_experts)}; observe this model"
            )
        counts = {n: [float(c) for c in layer.load.tolist()] for n, layer in enumerate(trace.layers)}
        pairs = {
            n: [[float(c) for c in row] for row in layer.transitions.tolist()]
            for n, layer in enumerate(trace.layers)
            if layer.transitions is not None
        }
        return Lesson(counts, pairs)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"
