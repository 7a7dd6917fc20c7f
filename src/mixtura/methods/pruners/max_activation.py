"""Pruning by the largest number an expert puts out."""

from __future__ import annotations

from typing import final

from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

METHOD = {
    "paper": 190,
    "title": "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
    "tags": ["statistic:max_output"],
}


@final
class MaxActivation(Pruner):
    """Drop the experts whose largest output value is smallest.

    Super experts, whose rare extreme values the attention sinks of a model rest on, are the last to go.
    To keep them under any other criterion, see the analysis ``super_experts``.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = MaxActivation().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [action.experts for action in plan.actions]
        [(1,), (3,)]

    Differences from the paper:
        The paper protects what it finds and has no ranking of the rest; the ranking by the same number is
        ``max_activations`` in REAP's code, which takes it with its sign, where here it is absolute.

    Reference:
        Unveiling Super Experts in Mixture-of-Experts Large Language Models (paper 190); REAP's code (paper
        136), CerebrasResearch/reap at 1970473, ``pruning_metrics.py``.
    """

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return keep_best(trace, budget, [layer.statistic("max_output") for layer in trace.layers])
