"""Router-weighted expert activation pruning."""

from __future__ import annotations

from typing import final

from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

METHOD = {
    "paper": 136,
    "title": "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    "tags": ["statistic:weighted_output_norm"],
}


@final
class Reap(Pruner):
    """Drop the experts that add least to the layer's output when they are chosen.

    An expert's score is the mean, over the tokens routed to it, of its routing weight times the
    norm of its output. An expert no token chose scores 0.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = Reap().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [action.experts for action in plan.actions]
        [(0,), (3,)]

    Differences from the paper:
        The weights are those the router really used, so sigmoid routers, correction biases and
        groups count as they are; a group-limited router loses the same number in each group.
        Domains are pooled by their number of tokens.

    Reference:
        REAP the Experts: Why Pruning Prevails for One-Shot MoE compression (paper 136); its code,
        CerebrasResearch/reap at 1970473, ``pruning_metrics.py`` and ``prune.py``.
    """

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return keep_best(trace, budget, [x.statistic("weighted_output_norm") for x in trace.layers])
