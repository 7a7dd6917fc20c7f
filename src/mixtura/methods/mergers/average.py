"""Merging by lot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch

from mixtura.methods._drawing import generator_of
from mixtura.methods.mergers import Merger
from mixtura.methods.mergers._shared import merge_all
from mixtura.types import Budget, Plan
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": None,
    "title": "Plain averages of random groups of experts, the baseline of all mergers",
    "tags": ["label_dependent"],
}


@final
class Average(Merger):
    """Average experts that are put together by lot, in groups of about one size.

    What any way of grouping must beat to be worth its pass over text. With ``by_use``, members are weighed
    by how often they were chosen, which shows what grouping alone is worth.

    Shapes:
        A trace of L layers to the same number of groups in each.

    Raises:
        BudgetError: no expert would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> plan = Average(seed=1).plan(sample_trace(seed=0, num_experts=4), Budget(num_experts=3))
        >>> [(action.experts, action.shares) for action in plan.actions]
        [((0, 1), (0.5, 0.5)), ((1, 0), (0.5, 0.5))]
    """

    def __init__(self, *, by_use: bool = False, seed: int = 0) -> None:
        self.by_use = by_use
        self.seed = seed

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        generator = generator_of(self.seed)

        def group(layer: LayerTrace, experts: Sequence[int], num_groups: int) -> list[list[int]]:
            order = torch.randperm(len(experts), generator=generator).tolist()
            return [[experts[place] for place in order[first::num_groups]] for first in range(num_groups)]

        return merge_all(trace, budget, group, by_use=self.by_use, aligned=False)
