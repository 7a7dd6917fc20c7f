"""Experts that a budget protects, for kinds that leave fewer of them."""

from __future__ import annotations

from mixtura.errors import UserError
from mixtura.types import Budget
from mixtura.types.trace import Trace


def check_protected(trace: Trace, budget: Budget) -> None:
    """Raise `UserError` where a budget protects a layer or expert that the trace has not."""
    for index, experts in budget.protected.items():
        size = trace.layer(index).shape.num_experts
        for expert in experts:
            if not 0 <= expert < size:
                raise UserError(
                    f"layer {index} has experts 0 to {size - 1}; there is no expert {expert} to protect"
                )
