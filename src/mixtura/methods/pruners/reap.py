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
    "tags": ["statistic:weighted_output_norm", "statistic:renormalized_output_norm"],
}


@final
class Reap(Pruner):
    """Drop the experts that add least to the layer's output when they are chosen.

    An expert's score is the mean, over the tokens routed to it, of its routing weight times the
    norm of its output. An expert no token chose scores 0. With ``renormalize`` a token's weights are
    divided by their sum first, which changes something only in models whose weights do not sum to one.

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
        groups count as they are, and a model whose weights sum to one needs no ``renormalize``, which in
        the paper's code is on and does something for such models alone. A group-limited router loses
        the same number in each group. Domains are pooled by their number of tokens. To keep super
        experts, as an option of its code does, plan with ``Budget(protected=...)`` of what the analysis
        ``super_experts`` finds; its option for outliers is the same with ``share_of_layers=1``.

    Reference:
        REAP the Experts: Why Pruning Prevails for One-Shot MoE compression (paper 136); its code,
        CerebrasResearch/reap at 1970473, ``pruning_metrics.py`` and ``prune.py``.
    """

    def __init__(self, *, renormalize: bool = False) -> None:
        self.renormalize = renormalize

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        name = "renormalized_output_norm" if self.renormalize else "weighted_output_norm"
        return keep_best(trace, budget, [layer.statistic(name) for layer in trace.layers])
