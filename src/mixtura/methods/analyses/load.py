"""How evenly experts are used."""

from __future__ import annotations

import math
from typing import final

from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Report

METHOD = {"paper": None, "title": "Expert load: balance, entropy, dead experts"}


@final
class Load(Analysis):
    """How evenly a layer's experts are used: balance, entropy, dead experts.

    ``max_over_mean`` is the busiest expert's load over the mean (1 is even, E the worst); ``entropy``
    that of the loads' shares, divided by log E (1 is even, 0 one expert alone); ``dead`` counts
    experts whose load is at most ``dead_share`` of the mean. The whole model's numbers are the
    worst layer's balance, the mean entropy and the sum of dead experts.

    Shapes:
        A trace of L layers to L rows.

    Raises:
        SettingError: ``dead_share`` is not in [0, 1].

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> Load().measure(Evidence.of(sample_trace(seed=0, num_experts=4))).rows[0]["dead"]
        0
    """

    def __init__(self, *, dead_share: float = 0.0) -> None:
        check_range("Load", "dead_share", dead_share, 0, 1)
        self.dead_share = dead_share

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        rows = [{"layer": layer.index, **self._row(layer.load)} for layer in trace.layers]
        seen = [row for row in rows if row["entropy"] is not None]
        scalars = {
            "max_over_mean": max((row["max_over_mean"] or 0 for row in seen), default=None),
            "entropy": sum(row["entropy"] or 0 for row in seen) / len(seen) if seen else None,
            "dead": sum(row["dead"] or 0 for row in rows),
        }
        return Report(scalars, tuple(rows))

    def _row(self, load: Int[Tensor, " E"]) -> dict[str, float | None]:
        mean = load.double().mean().item()
        dead = int((load <= self.dead_share * mean).sum())
        if mean == 0:
            return {"max_over_mean": None, "entropy": None, "dead": dead}
        return {
            "max_over_mean": load.max().item() / mean,
            "entropy": _entropy(load.double() / load.sum()),
            "dead": dead,
        }


def _entropy(shares: Float[Tensor, " E"]) -> float:
    """Entropy of shares over that of an even split; a layer of one expert counts as even."""
    if shares.shape[0] == 1:
        return 1.0
    return -(shares.xlogy(shares)).sum().item() / math.log(shares.shape[0])
