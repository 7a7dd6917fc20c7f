"""How much a router gives up of what it likes to keep the load even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._drawing import generator_of
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.methods.analyses._congestion import best_gamma, best_temperature, equilibrium, tempered
from mixtura.methods.analyses._shared import curves_of_layers, marks, mean_of, over_layers, shares_of
from mixtura.types.trace import Trace

METHOD = {
    "paper": 199,
    "title": ("Three Phases of Expert Routing: How Load Balance Evolves During Mixture-of-Experts Training"),
    "tags": ["needs:choices", "needs:logits"],
}


@final
class Congestion(Analysis):
    """Effective congestion: the load that a game of tokens avoiding crowded experts would settle at.

    ``gamma`` is the coefficient with which shares m_i that are proportional to exp(q_i - gamma * m_i), q
    being the experts' mean logits, come nearest to the observed shares of the load (``error``, the sum of
    absolute differences): 0 where load follows preference, large where it is even whatever is preferred.
    ``low`` and ``high`` are the middle 95 % over ``draws`` resamplings of the texts. ``held_out`` and
    ``held_out_softmax`` are errors on every second text, fitted on the others, of this and of a softmax with
    a temperature, which fits about as well: gamma is a reading of it, not a better prediction. Of all layers
    the median gamma is given; 10,000 is where the search ends, and means that loads are even.

    Of traces of several checkpoints it shows gamma over the steps: balance is learnt first, given up last.

    Shapes:
        A trace of L layers with logits [S, E] to L rows.

    Raises:
        SettingError: ``draws`` is out of range.
        UserError: the trace has no logits or no choices.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = Congestion(draws=10).measure(Evidence.of(sample_trace(seed=0)))
        >>> round(report.scalars["gamma"], 2)
        0.16

    Differences from the paper:
        Its abstract alone was read, and no estimator is named there: quality is the mean logit, the
        equilibrium is exact, gamma is found by a grid and a bounded search. Of its four estimators of quality
        one is here; the types of tokens and the decomposition are not.

    Reference:
        Three Phases of Expert Routing: How Load Balance Evolves During Mixture-of-Experts Training (paper
        199).
    """

    def __init__(self, *, draws: int = 50, seed: int = 0) -> None:
        check_range("Congestion", "draws", draws, 0, 10_000)
        self.draws = draws
        self.seed = seed

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        rows = [self._row(trace, layer.index) for layer in trace.layers]
        names = ("gamma", "error", "held_out", "held_out_softmax")
        scalars = {name: mean_of(row[name] for row in rows) for name in names}
        known = [row["gamma"] for row in rows if row["gamma"] is not None]
        scalars["gamma"] = float(np.median(known)) if known else None
        figures = over_layers("Congestion by layer", "gamma", rows, "gamma")
        if len(evidence.traces) > 1:
            steps: dict[int, list[tuple[float, float | None]]] = {}
            for step, one in evidence.series():
                for layer in one.layers:
                    quality, shares = _texts(one, layer.index)
                    found = _fitted(quality.sum(0), shares.sum(0))
                    steps.setdefault(layer.index, []).append((step, found and found[0]))
            figures += curves_of_layers("Congestion over training", "step", "gamma", steps)
        return Report(scalars, tuple(rows), figures=figures)

    def _row(self, trace: Trace, index: int) -> dict[str, float | None]:
        quality, load = _texts(trace, index)
        whole = _fitted(quality.sum(0), load.sum(0))
        names = ("gamma", "error", "low", "high", "temperature", "held_out", "held_out_softmax")
        row: dict[str, float | None] = {"layer": index}
        if whole is None:
            return row | dict.fromkeys(names)
        q, shares = _mean_logits(quality.sum(0)), shares_of(load.sum(0)).numpy()
        drawn = self._drawn(quality, load)
        low, high = np.quantile(drawn, (0.025, 0.975)).tolist() if drawn else (None, None)
        held = _held_out(quality, load)
        return row | dict(zip(names, (*whole, low, high, best_temperature(q, shares), *held), strict=True))

    def _drawn(self, quality: Float[Tensor, "S E1"], load: Float[Tensor, "S E"]) -> list[float]:
        generator = generator_of(self.seed)
        found = []
        for _ in range(self.draws if len(load) > 1 else 0):
            picked = torch.randint(0, len(load), (len(load),), generator=generator)
            fitted = _fitted(quality[picked].sum(0), load[picked].sum(0))
            found += [] if fitted is None else [fitted[0]]
        return found


def _texts(trace: Trace, index: int) -> tuple[Float[Tensor, "S E1"], Float[Tensor, "S E"]]:
    """Of each text: sums of logits by expert and, last, how many tokens they are of; loads by expert."""
    sequences, num_experts = trace.sequences(index), trace.layer(index).shape.num_experts
    logits = trace.logits(index).double()
    rows = torch.cat([logits, torch.ones(len(logits), 1, dtype=torch.float64)], 1)
    sums = torch.zeros(len(sequences), num_experts + 1, dtype=torch.float64)
    sums.index_add_(0, trace.sequence_of_logits(), rows)
    loads = [marks(choices, num_experts).sum(0).double() for choices in sequences]
    return sums, torch.stack(loads) if loads else torch.zeros(0, num_experts, dtype=torch.float64)


def _mean_logits(sums: Float[Tensor, " E1"]) -> np.ndarray:
    found: np.ndarray = (sums[:-1] / sums[-1].clamp(min=1)).numpy()
    return found


def _fitted(quality: Float[Tensor, " E1"], load: Float[Tensor, " E"]) -> tuple[float, float] | None:
    """The best gamma and what error it leaves; None where nothing was seen."""
    if not bool(load.sum()) or not bool(quality[-1]):
        return None
    return best_gamma(_mean_logits(quality), shares_of(load).numpy())


def _held_out(quality: Float[Tensor, "S E1"], load: Float[Tensor, "S E"]) -> Sequence[float | None]:
    """Errors on every second text of both models fitted on the others."""
    known, new = (_fitted(quality[i::2].sum(0), load[i::2].sum(0)) for i in (0, 1))
    if known is None or new is None:
        return None, None
    q, shares = _mean_logits(quality[0::2].sum(0)), shares_of(load[0::2].sum(0)).numpy()
    later, truth = _mean_logits(quality[1::2].sum(0)), shares_of(load[1::2].sum(0)).numpy()
    made = equilibrium(later, known[0]), tempered(later, best_temperature(q, shares))
    return [float(np.abs(one - truth).sum()) for one in made]
