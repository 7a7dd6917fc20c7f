"""Pruning by how much of each task's tokens an expert takes."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 168,
    "title": "Scalable and Efficient MoE Training for Multitask Multilingual Models",
}


@final
class Utilisation(Pruner):
    """Drop the experts that tasks or languages use least, all tasks weighing the same.

    An expert's utilisation in a domain is its share of that domain's choices. Its score is the mean of its
    utilisations over domains, or the largest, which keeps experts of rare tasks and languages that a count
    over all text would drop.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.
        SettingError: ``over_domains`` is neither "mean" nor "max".

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = Utilisation().plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [action.experts for action in plan.actions]
        [(1,), (0,)]

    Differences from the paper:
        Only the abstract was read: "an expert pruning strategy" for a multitask multilingual model, by
        utilisation as its summaries say. How tasks are weighed against each other is a decision of ours.
        Training on after pruning is left to `mixtura train` and the like.

    Reference:
        Scalable and Efficient MoE Training for Multitask Multilingual Models (paper 168).
    """

    def __init__(self, *, over_domains: Literal["mean", "max"] = "mean") -> None:
        if over_domains not in ("mean", "max"):
            raise SettingError(f"over_domains of Utilisation must be 'mean' or 'max', got {over_domains!r}")
        self.over_domains = over_domains

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return keep_best(trace, budget, [self._score(layer) for layer in trace.layers])

    def _score(self, layer: LayerTrace) -> Float[Tensor, " E"]:
        counts = layer.counts.double()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return shares.mean(0) if self.over_domains == "mean" else shares.amax(0)
