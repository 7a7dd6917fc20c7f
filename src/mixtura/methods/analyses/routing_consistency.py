"""How much of a segment of text is served by the same experts, and by a cache that looks ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.methods.analyses._caching import segment_hits

METHOD = {
    "paper": 119,
    "title": (
        "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models"
    ),
    "tags": ["needs:choices"],
}


@final
class RoutingConsistency(Analysis):
    """Local routing consistency: would experts that are kept for a segment of text serve it?

    ``srp`` is the segment routing best performance: the best F-score of saying of each expert that it serves
    a whole segment of ``segment`` tokens, or none of it, over the number of times it must be chosen there to
    be said so; ``srp_size`` is how many experts that says, over those that serve. ``sch`` is the segment
    cache best hit rate: of a cache of ``cache`` times K experts that knows the segment ahead. Both are 1
    where routing never changes within segments. Segments and caches stay within a sequence; the model's
    numbers are of all layers together for ``srp``, and the layers' mean for ``sch``.

    Shapes:
        A trace of L layers with choices [T, K] to L rows.

    Raises:
        SettingError: ``segment`` or ``cache`` is out of range.
        UserError: the trace has no choices by sequence.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = RoutingConsistency(segment=4).measure(Evidence.of(sample_trace(seed=0, num_experts=4)))
        >>> [round(value, 3) for value in report.scalars.values()]
        [0.75, 1.342, 1.0]

    Differences from the paper:
        No confidence intervals. Every sequence is replayed for the cache, where its code takes one in
        sixteen, and a cache for all layers together is not. Sequences shorter than a segment have no segment,
        and count for the cache like any other.

    Reference:
        Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models (paper
        119); its code, ljcleo/moe-lrc at 7b3ca46, ``30_srp_calc.py``, ``31_srp_refine.py`` and
        ``41_sch_calc.py``.
    """

    def __init__(self, *, segment: int = 16, cache: float = 2.0) -> None:
        check_range("RoutingConsistency", "segment", segment, 1, 1 << 20)
        check_range("RoutingConsistency", "cache", cache, 0.01, 10_000)
        self.segment = segment
        self.cache = cache

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        rows: list[dict[str, float | None]] = []
        whole = torch.zeros(3, self.segment + 1, dtype=torch.float64)
        rates = []
        for layer in trace.layers:
            sequences = trace.sequences(layer.index)
            counted = sum(
                (segment_counts(one, layer.shape.num_experts, self.segment) for one in sequences),
                torch.zeros_like(whole),
            )
            whole += counted
            size = max(1, round(self.cache * layer.top_k))
            rate = _rate(sequences, layer.shape.num_experts, size, self.segment)
            rates += [] if rate is None else [rate]
            score, share = best_score(counted)
            rows.append({"layer": layer.index, "srp": score, "srp_size": share, "sch": rate})
        score, share = best_score(whole)
        mean = sum(rates) / len(rates) if rates else None
        return Report({"srp": score, "srp_size": share, "sch": mean}, tuple(rows))


def segment_counts(choices: Int[Tensor, "T K"], num_experts: int, segment: int) -> Float[Tensor, "3 _"]:
    """By the least number of times, 0 to ``segment``: choices met, choices said, and choices there are.

    Over all experts and all windows of so many tokens of one sequence.
    """
    made = torch.zeros(3, segment + 1, dtype=torch.float64)
    if len(choices) < segment:
        return made
    ids = choices.long().clamp(max=num_experts)
    hot = F.one_hot(ids, num_experts + 1).sum(1)[:, :num_experts].clamp(max=1)
    sums = F.pad(hot.cumsum(0), (0, 0, 1, 0))
    times = (sums[segment:] - sums[:-segment]).flatten()
    of_each = torch.bincount(times, minlength=segment + 1).double()
    made[0] = (of_each * torch.arange(segment + 1)).flip(0).cumsum(0).flip(0)
    made[1] = of_each.flip(0).cumsum(0).flip(0) * segment
    made[2] = made[0, 0]
    return made


def best_score(counted: Float[Tensor, "3 _"]) -> tuple[float | None, float | None]:
    """The best F-score over least numbers of times, and what it says over what there is."""
    met, said, there = counted
    if not bool(there.sum()):
        return None, None
    scores = 2 * met / (said + there).clamp(min=1)
    best = int(scores.argmax())
    return float(scores[best]), float(said[best] / there[best])


def _rate(sequences: Sequence[Tensor], num_experts: int, size: int, segment: int) -> float | None:
    """The mean over sequences of the share of choices that a cache has."""
    found = []
    for choices in sequences:
        tokens = [[expert for expert in token if expert < num_experts] for token in choices.tolist()]
        number = sum(map(len, tokens))
        if number:
            found.append(segment_hits(tokens, size, segment) / number)
    return sum(found) / len(found) if found else None
