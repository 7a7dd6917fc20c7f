"""Pruning for a domain by what experts add to the tokens they change."""

from __future__ import annotations

from typing import final

from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

METHOD = {
    "paper": 5,
    "title": "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    "tags": ["statistic:output_norm_by_change"],
}


@final
class EasyEp(Pruner):
    """Drop the experts that add least to a domain's tokens, tokens that the layer changes counting most.

    An expert's score is the sum, over the tokens routed to it, of its routing weight times the norm of its
    output times one minus the cosine between the token's hidden state before and after the routed experts
    (EASY-EP). It is made for one domain: plan with ``trace.of("code")``. Of several domains, each has the
    same say: its scores in a layer are divided by their sum first.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = EasyEp().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [action.experts for action in plan.actions]
        [(1,), (3,)]

    Differences from the paper:
        All text that was observed counts, where the paper's code takes the 25 longest of its
        demonstrations, each a prompt with the model's own answer. Its script for several domains cannot
        run as released; what it means to do is done here. The same number of experts goes from each group
        of a group-limited router.

    Reference:
        Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations (paper 5,
        arXiv 2504.06792); its code, RUCAIBox/EASYEP at 7324eb1, ``pruning/expert_selection.py`` and
        ``expert_selection_mix_domain.py``.
    """

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        scores = []
        for layer in trace.layers:
            total = layer.total("output_norm_by_change")
            whole = total.sum(1, keepdim=True)
            scores.append((total / whole.where(whole > 0, 1.0)).sum(0))
        return keep_best(trace, budget, scores)
