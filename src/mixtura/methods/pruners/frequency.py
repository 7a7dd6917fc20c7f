"""Pruning by how often an expert is chosen."""

from __future__ import annotations

from typing import final

from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

METHOD = {
    "paper": None,
    "title": "Expert frequency, the baseline of pruning papers",
}


@final
class Frequency(Pruner):
    """Drop the experts that are chosen least often.

    The simplest criterion that looks at the text at all, and the baseline others must beat.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = Frequency().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [action.experts for action in plan.actions]
        [(1,), (0,)]

    Differences from the paper:
        There is no one paper. Counts are of the experts that really ran, where REAP's code counts
        the top-k of a softmax whatever the model's router does.

    Reference:
        ``expert_frequency`` in REAP's code, CerebrasResearch/reap at 1970473 (paper 136).
    """

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return keep_best(trace, budget, [layer.load.double() for layer in trace.layers])
