"""Pruning by lot."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._drawing import generator_of
from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

METHOD = {
    "paper": None,
    "title": "Random experts, the baseline of all criteria",
    "tags": ["label_dependent"],
}


@final
class Random(Pruner):
    """Drop experts drawn by lot, the same for the same seed.

    What any criterion must beat to be worth its pass over text.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = Random(seed=1).plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [action.experts for action in plan.actions]
        [(1,), (0,)]

    Differences from the paper:
        There is no paper.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        generator = generator_of(self.seed)
        lots = [torch.rand(layer.shape.num_experts, generator=generator) for layer in trace.layers]
        return keep_best(trace, budget, lots)
