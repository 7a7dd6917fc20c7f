"""HC-SMoE: hierarchical clustering of experts by what they put out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.mergers import Merger
from mixtura.methods.mergers._shared import finite_feature, merge_all
from mixtura.types import Budget, Plan
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": None,
    "title": "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering",
    "tags": ["feature:mean_output"],
}


@final
class HcSmoe(Merger):
    """Merge experts whose mean outputs are near each other, found by hierarchical clustering.

    Each expert is represented by the mean of its outputs. The two nearest clusters are joined until as many
    are left as the budget allows; how near clusters are is the mean, the largest or the least distance of
    their members (``linkage``). Members are averaged with how often they were chosen as weights. What the
    router does plays no part in who is merged with whom.

    Shapes:
        A trace of L layers to the same number of groups in each.

    Raises:
        BudgetError: no expert would be left.
        UserError: the trace lacks the feature ``mean_output``, or it is not finite.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = HcSmoe().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=2))
        >>> [action.experts for action in plan.actions]
        [(3, 0, 1), (2, 1, 3)]

    Differences from the paper:
        An expert's outputs are averaged over the tokens that chose it; in the paper, over all tokens, for
        which every expert runs on every token. Experts that no token chose have a mean of zero and so
        find each other.

    Reference:
        Retraining-Free Merging of Sparse MoE via Hierarchical Clustering; its code, wazenmai/HC-SMoE.
    """

    def __init__(self, *, linkage: Literal["average", "complete", "single"] = "average") -> None:
        self.linkage = linkage

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return merge_all(trace, budget, self._clustered, by_use=True, aligned=False)

    def _clustered(self, layer: LayerTrace, experts: Sequence[int], num_groups: int) -> list[list[int]]:
        rows = finite_feature(layer, "mean_output")[list(experts)]
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        apart.fill_diagonal_(torch.inf)
        clusters = {place: [place] for place in range(len(experts))}
        while len(clusters) > num_groups:
            one, other = sorted(divmod(int(apart.argmin()), len(experts)))
            joined = self._joined(apart[one], apart[other], len(clusters[one]), len(clusters[other]))
            apart[one] = apart[:, one] = joined
            apart[other] = apart[:, other] = torch.inf
            apart[one, one] = torch.inf
            clusters[one] += clusters.pop(other)
        return [[experts[place] for place in cluster] for cluster in clusters.values()]

    def _joined(
        self, one: Float[Tensor, " n"], other: Float[Tensor, " n"], size: int, other_size: int
    ) -> Float[Tensor, " n"]:
        """Distances of two clusters that become one to every other cluster."""
        if self.linkage == "average":
            return (size * one + other_size * other) / (size + other_size)
        return torch.maximum(one, other) if self.linkage == "complete" else torch.minimum(one, other)
