"""Balancing by a bias on scores as the solution of an assignment problem, replayed."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.methods.analyses._shared import curves_of_layers, mean_of, ratio

METHOD = {
    "paper": 134,
    "title": (
        "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse Mixture-of-Experts in "
        "Large-Scale AI Models"
    ),
    "tags": ["needs:logits"],
}


@final
class BalanceDuality(Analysis):
    """Balancing without a loss, replayed: what a bias on the scores would even out, and what it would cost.

    The scores that were observed are an assignment problem: the greatest sum of scores with K experts a token
    and an even number of tokens an expert. Adding a bias that falls for experts with too many tokens and
    rises for the others is an ascent on its dual, whose value falls as loads become even. From a bias of 0 so
    many ``steps`` are made. ``violation`` is the largest load over the mean, less 1, before and ``after``;
    ``dual`` and ``dual_after`` the value of the dual problem a token; ``cost`` the part of the tokens' own
    best scores that is given up; ``moved`` the choices that change in a step, on average; ``wrong`` those of
    them that leave an expert with too few tokens or join one with too many, of which a bias that moves by
    ``sign`` has none.

    Shapes:
        A trace of L layers with logits [S, E] to L rows.

    Raises:
        SettingError: a setting is out of range.
        UserError: the trace has no logits.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = BalanceDuality(steps=100).measure(Evidence.of(sample_trace(seed=0)))
        >>> [round(report.scalars[name], 3) for name in ("violation", "after", "wrong")]
        [1.225, 0.133, 0.0]

    Differences from the paper:
        Its abstract alone was read. Scores stay what they are, where in training they move with the bias; so
        this is its deterministic setting, and its bound on regret is not measured. ``rate`` is ours.

    Reference:
        A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse Mixture-of-Experts in
        Large-Scale AI Models (paper 134).
    """

    def __init__(
        self,
        *,
        steps: int = 50,
        rate: float = 0.01,
        update: Literal["sign", "proportional"] = "sign",
        scores: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        check_range("BalanceDuality", "steps", steps, 1, 100_000)
        check_range("BalanceDuality", "rate", rate, 1e-9, 1e3)
        self.steps = steps
        self.rate = rate
        self.update = update
        self.scores = scores

    def measure(self, evidence: Evidence) -> Report:
        trace, rows, violations, duals = evidence.trace, [], {}, {}
        names = ("violation", "after", "dual", "dual_after", "cost", "moved", "wrong")
        for layer in trace.layers:
            logits = trace.logits(layer.index).double()
            row: dict[str, float | None] = {"layer": layer.index}
            if not len(logits):
                rows.append(row | dict.fromkeys(names))
                continue
            scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
            found = self.replay(scores, layer.top_k)
            violations[layer.index] = list(enumerate(found["violation"]))
            duals[layer.index] = list(enumerate(found["dual"]))
            values = (
                found["violation"][0],
                found["violation"][-1],
                found["dual"][0],
                found["dual"][-1],
                found["cost"][-1],
                mean_of(found["moved"]),
                ratio(sum(found["wrong"]), sum(found["moved"])) or 0.0,
            )
            rows.append(row | dict(zip(names, values, strict=True)))
        figures = curves_of_layers("Largest load over the mean, less 1", "step", "violation", violations)
        figures += curves_of_layers("Value of the dual problem", "step", "a token", duals)
        return Report({n: mean_of(row[n] for row in rows) for n in names}, tuple(rows), figures=figures)

    def replay(self, scores: Float[Tensor, "S E"], top_k: int) -> dict[str, list[float]]:
        """What each step leaves; the first entries are of no bias at all."""
        num_tokens, num_experts = scores.shape
        room, bias = num_tokens * top_k / num_experts, torch.zeros(num_experts, dtype=scores.dtype)
        best = float(scores.topk(top_k).values.sum())
        found: dict[str, list[float]] = {n: [] for n in ("violation", "dual", "cost", "moved", "wrong")}
        chosen, load = _chosen(scores, bias, top_k)
        for step in range(self.steps + 1):
            found["violation"].append(float(load.max()) / room - 1)
            dual = float((scores + bias).topk(top_k).values.sum() - room * bias.sum())
            found["dual"].append(dual / num_tokens)
            found["cost"].append(1 - float(scores[chosen].sum()) / best if best else 0.0)
            if step == self.steps:
                return found
            gap = (room - load) / room
            bias = bias + self.rate * (gap.sign() if self.update == "sign" else gap)
            before, chosen, crowd = chosen, *_chosen(scores, bias, top_k)
            lost, gained = before & ~chosen, chosen & ~before
            found["moved"].append(float(gained.sum()))
            found["wrong"].append(
                float(((lost & (load < room)).any(1) | (gained & (load > room)).any(1)).sum())
            )
            load = crowd
        return found


def _chosen(
    scores: Float[Tensor, "S E"], bias: Float[Tensor, " E"], top_k: int
) -> tuple[Bool[Tensor, "S E"], Float[Tensor, " E"]]:
    """Which experts each token chooses with a bias, and their loads.

    Scores too small to show beside a bias still decide between experts of the same bias.
    """
    falling = torch.sort(scores, dim=1, descending=True, stable=True).indices
    sums = (scores + bias).gather(1, falling)
    ids = falling.gather(1, torch.sort(sums, dim=1, descending=True, stable=True).indices[:, :top_k])
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
    return chosen, chosen.sum(0).double()
