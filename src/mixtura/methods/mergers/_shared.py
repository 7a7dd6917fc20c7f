"""How many experts every layer stores within a budget, and the plan that groups of experts make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import BudgetError, UserError
from mixtura.methods._protected import check_protected
from mixtura.types import Budget, Merge, Plan
from mixtura.types.trace import LayerTrace, Trace

# From a layer, its experts that may be merged and how many groups, to these groups.
Grouping = Callable[[LayerTrace, Sequence[int], int], list[list[int]]]


def merge_all(trace: Trace, budget: Budget, group: Grouping, *, by_use: bool, aligned: bool) -> Plan:
    """The plan that merges each layer's experts into as many as the budget allows.

    Args:
        trace: what was observed.
        budget: experts stored per layer, or bytes of the experts of all layers.
        group: divides experts of a layer.
        by_use: weigh members by how often they were chosen, else alike; so, too, where none of a group was.
        aligned: have hidden features put in order first.

    Raises:
        BudgetError: the budget asks for no expert at all, or for fewer than it protects and one more.
        UserError: an expert is protected that is not there.
    """
    stored = num_stored(trace, budget)
    merges: list[Merge] = []
    for layer in trace.layers:
        size = layer.shape.num_experts
        if stored >= size:
            continue
        alone = set(budget.protected.get(layer.index, ()))
        free = [expert for expert in range(size) if expert not in alone]
        groups = group(layer, free, stored - len(alone))
        merges += [_merge(layer, g, by_use=by_use, aligned=aligned) for g in groups if len(g) > 1]
    return Plan(trace.source_digest, tuple(merges))


def num_stored(trace: Trace, budget: Budget) -> int:
    """The largest number of experts that every layer can store within a budget.

    Raises:
        BudgetError: not even the smallest number that is possible fits; the message says it.
        UserError: an expert is protected that is not there.
    """
    check_protected(trace, budget)
    whole = max((layer.shape.num_experts for layer in trace.layers), default=0)
    need = 1
    for index, experts in budget.protected.items():
        size = trace.layer(index).shape.num_experts
        need = max(need, min(len(set(experts)) + 1, size))
    if budget.num_experts is not None:
        largest, given, least = budget.num_experts, f"{budget.num_experts} experts per layer", str(need)
    else:
        limit = budget.num_bytes or 0
        largest = next((n for n in range(whole, 0, -1) if _num_bytes(trace, n) <= limit), 0)
        given, least = f"{limit} bytes of experts", f"{_num_bytes(trace, need)} bytes"
    if largest < need:
        raise BudgetError(
            f"{given} are too few by merging experts alone, which leaves at least one in each layer beside "
            f"those that are protected; give at least {least}, or store experts in fewer bits as well"
        )
    return min(largest, whole)


def most_used(layer: LayerTrace, experts: Sequence[int]) -> list[int]:
    """Experts from the one chosen most to the one chosen least, of equals the lowest number first."""
    load = layer.load.tolist()
    return sorted(experts, key=lambda expert: (-load[expert], expert))


def finite_feature(layer: LayerTrace, name: str) -> Float[Tensor, "E _"]:
    """A feature of a layer's experts in float64.

    Raises:
        UserError: the trace lacks it, or it is not finite.
    """
    found = layer.feature(name).double()
    if not bool(found.isfinite().all()):
        raise UserError(
            f"the feature {name} of an expert of layer {layer.index} is not finite; look for NaN or infinity "
            "in the model's weights"
        )
    return found


def _merge(layer: LayerTrace, members: Sequence[int], *, by_use: bool, aligned: bool) -> Merge:
    """The average of a group, led by its most used member."""
    ordered = most_used(layer, members)
    load: Float[Tensor, " n"] = layer.load.double()[ordered]
    if not by_use or load.sum() == 0:
        load = torch.ones_like(load)
    return Merge(layer.index, tuple(ordered), tuple((load / load.sum()).tolist()), aligned)


def _num_bytes(trace: Trace, stored: int) -> int:
    return sum(min(stored, layer.shape.num_experts) * layer.expert_num_bytes for layer in trace.layers)
