"""Experts that every domain relies on."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._parts import part_above
from mixtura.methods.analyses import Analysis, Evidence, Report, Table
from mixtura.methods.analyses._shared import mean_of, over_layers, ratio
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 88,
    "title": (
        'The Illusion of Specialization: Unveiling the Domain-Invariant "Standing Committee" in '
        "Mixture-of-Experts Models"
    ),
}


@final
class StandingCommittee(Analysis):
    """Standing committee: the experts that all domains rely on, and how much of the routing they take.

    In each domain experts are ranked by their share of the routing weight, the first ``ranked`` of them (K by
    default); one that is not among them has the rank after the last. Of the experts that are ranked in at
    least ``presence`` of the domains (of the most, where none is) the committee are those that no other beats
    in both mean rank and its variance. ``coverage`` is the committee's share of all routing weight, and
    ``advantage`` what a member gets over what another expert gets.

    Shapes:
        A trace of L layers and M domains to L rows.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = StandingCommittee().measure(Evidence.of(sample_trace(seed=0)))
        >>> [row["size"] for row in report.rows]
        [1, 4]

    Differences from the paper:
        Weight is added up over all tokens of a domain, those that did not choose the expert being 0; its code
        takes a table of weights as given. ``coverage`` is of all routing weight, where the code's is of the
        experts that are ranked, and ``advantage`` takes the number of experts from the model instead of
        guessing it from the highest number seen.

    Reference:
        The Illusion of Specialization: Unveiling the Domain-Invariant "Standing Committee" in
        Mixture-of-Experts Models (paper 88); its code, The-FinAI/CommitteeAudit at 6473b34,
        ``Audit_Committee.py``.
    """

    def __init__(self, *, presence: float = 0.8, ranked: int | None = None) -> None:
        check_range("StandingCommittee", "presence", presence, 1e-9, 1)
        if ranked is not None:
            check_range("StandingCommittee", "ranked", ranked, 1, 1 << 20)
        self.presence = presence
        self.ranked = ranked

    def measure(self, evidence: Evidence) -> Report:
        trace, rows, named = evidence.trace, [], []
        for layer in trace.layers:
            ranks, weights = self._ranks(layer)
            members = self._members(ranks, self._limit(layer))
            rows.append(_row(layer, members, ranks, weights))
            named.append((layer.index, ", ".join(map(str, members)) or "-"))
        scalars = {name: mean_of(row[name] for row in rows) for name in ("size", "coverage", "advantage")}
        figures = over_layers("What the committee takes of the routing weight", "share", rows, "coverage")
        table = Table(title="Members by layer", columns=("layer", "experts"), rows=tuple(named))
        return Report(scalars, tuple(rows), tables=(table,), figures=figures)

    def find(self, trace: Trace) -> dict[int, tuple[int, ...]]:
        """The committee by decoder layer; layers where nothing was seen are absent."""
        found = {
            layer.index: self._members(self._ranks(layer)[0], self._limit(layer)) for layer in trace.layers
        }
        return {index: members for index, members in found.items() if members}

    def _ranks(self, layer: LayerTrace) -> tuple[Float[Tensor, "M E"], Float[Tensor, "M E"]]:
        """Of the domains that were seen: ranks from 1, those not ranked being one more; shares of weight."""
        sums = layer.weight_sums.double()
        sums = sums[sums.sum(1) > 0]
        weights = sums / sums.sum(1, keepdim=True)
        limit = self._limit(layer)
        order = torch.sort(weights, dim=1, descending=True, stable=True).indices
        places = torch.arange(1.0, weights.shape[1] + 1, dtype=torch.float64).expand_as(weights)
        ranks = torch.empty_like(weights).scatter(1, order, places)
        return ranks.masked_fill((ranks > limit) | (weights == 0), limit + 1), weights

    def _limit(self, layer: LayerTrace) -> int:
        return min(self.ranked or layer.top_k, layer.shape.num_experts)

    def _members(self, ranks: Float[Tensor, "M E"], limit: int) -> tuple[int, ...]:
        if not ranks.numel():
            return ()
        present = (ranks <= limit).sum(0)
        able = present >= part_above(self.presence, len(ranks))
        able = able if bool(able.any()) else present == present.max()
        mean, spread = ranks.mean(0).tolist(), ranks.var(0, unbiased=False).tolist()
        found = able.nonzero().flatten().tolist()

        def beaten(one: int, by: int) -> bool:
            no_worse = mean[by] <= mean[one] and spread[by] <= spread[one]
            return no_worse and (mean[by], spread[by]) != (mean[one], spread[one])

        return tuple(one for one in found if not any(beaten(one, other) for other in found))


def _row(
    layer: LayerTrace, members: tuple[int, ...], ranks: Float[Tensor, "M E"], weights: Float[Tensor, "M E"]
) -> dict[str, float | None]:
    row: dict[str, float | None] = {"layer": layer.index, "size": len(members) if members else None}
    names = ("mean_rank", "rank_variance", "coverage", "advantage")
    if not members:
        return row | dict.fromkeys(names)
    chosen = list(members)
    covered, others = float(weights.mean(0)[chosen].sum()), layer.shape.num_experts - len(members)
    member, other = covered / len(members), ratio(1 - covered, others)
    advantage = ratio(member, other) if other else None
    spread = ranks.var(0, unbiased=False)[chosen].mean()
    values = float(ranks.mean(0)[chosen].mean()), float(spread), covered, advantage
    return row | dict(zip(names, values, strict=True))
