"""Choosing which experts become one."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

KIND = {
    "base": "Merger",
    "summary": "Chooses groups of experts that are stored as one.",
    "tags": {
        "feature:NAME": "it reads this feature of `mixtura.types.trace.FEATURES`, which the pass records",
        "label_dependent": "which experts are merged depends on the numbers that they happen to have",
    },
}


class Merger(ABC):
    """Chooses groups of experts, each to be stored as the weighted average of its members.

    The router keeps a row for every member: a token that chooses several of a group gets that one expert
    with the sum of their weights. A method names the features of experts it reads as tags
    (``"feature:mean_output"``).
    """

    @abstractmethod
    def plan(self, trace: Trace, budget: Budget) -> Plan:
        """Merge experts until the budget holds.

        ``budget.num_experts`` is how many experts each layer stores; ``budget.num_bytes`` bounds the experts'
        bytes over all layers. Experts that the budget protects are not merged with others.

        Raises:
            BudgetError: a layer would store no expert, or fewer than are protected and one more.
        """
