"""Choosing which experts to drop."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

KIND = {
    "base": "Pruner",
    "summary": "Chooses the experts to drop within a budget.",
    "tags": {
        "statistic:NAME": "it reads this statistic, which the pass records",
        "label_dependent": "which experts go depends on the numbers that they happen to have",
    },
}


class Pruner(ABC):
    """Chooses which experts to drop.

    A method names the statistics it reads as tags (``"statistic:weighted_output_norm"``), so that
    the pass over text records them and no others.
    """

    @abstractmethod
    def plan(self, trace: Trace, budget: Budget) -> Plan:
        """Drop experts until the budget holds.

        Every layer keeps the same number of experts and every group of a group-limited router loses
        the same number, so that the result is an ordinary checkpoint. ``budget.num_experts`` is what
        each layer keeps; ``budget.num_bytes`` bounds the experts' bytes over all layers.

        Raises:
            BudgetError: a layer would keep fewer experts than a token chooses.
        """
