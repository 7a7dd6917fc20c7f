"""M-SMoE: experts join the often used expert that the router likes for the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.methods.mergers import Merger
from mixtura.methods.mergers._shared import finite_feature, merge_all, most_used
from mixtura.types import Budget, Plan
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 120,
    "title": "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
    "tags": ["feature:logit_products"],
}


@final
class MSmoe(Merger):
    """Merge each rarely used expert into the dominant one whose router logits are most like its own.

    The experts that were chosen most are dominant, one a group. Every other expert joins the dominant one
    with the largest cosine between their logits over all tokens of the text. Members are averaged with how
    often they were chosen as weights, their hidden features first put into the order that fits the dominant
    expert's best (``align``): the order of features means nothing, and an average of two that differ is
    neither.

    Shapes:
        A trace of L layers to the same number of groups in each.

    Raises:
        BudgetError: no expert would be left.
        UserError: the trace lacks the feature ``logit_products``, or it is not finite.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = MSmoe().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=2))
        >>> [action.experts for action in plan.actions]
        [(3, 2), (0, 1), (2, 3, 0)]

    Differences from the paper:
        Every layer has the same number of groups; the paper shares groups out by use over all layers.
        Hidden features are aligned to each group's dominant expert, not to expert 0, and with gate, up and
        down together, by their inner products (the paper's code has no gate). The low-rank and sparse step
        of MC-SMoE is the quantizer ``low_rank_sparse``; the distillation that follows is not done. An expert
        that was never chosen has no share in the average.

    Reference:
        Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (paper 120); its
        code, UNITES-Lab/MC-SMoE, ``merging/grouping.py`` and ``merging/permutation.py``.
    """

    def __init__(self, *, align: bool = True) -> None:
        self.align = align

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return merge_all(trace, budget, _around_dominant, by_use=True, aligned=self.align)


def _around_dominant(layer: LayerTrace, experts: Sequence[int], num_groups: int) -> list[list[int]]:
    products = finite_feature(layer, "logit_products")
    lengths = products.diagonal().clamp(min=0).sqrt().clamp(min=1e-12)
    alike = products / (lengths[:, None] * lengths)
    ordered = most_used(layer, experts)
    dominant = ordered[:num_groups]
    groups = {expert: [expert] for expert in dominant}
    for expert in ordered[num_groups:]:
        groups[dominant[int(alike[expert, dominant].argmax())]].append(expert)
    return list(groups.values())
