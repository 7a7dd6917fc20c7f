"""How many experts every layer keeps within a budget, and which by score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import BudgetError, UserError
from mixtura.methods._protected import check_protected
from mixtura.types import Budget, Drop, Plan
from mixtura.types.trace import LayerTrace, Trace

# Routers that choose groups first rank a group by the sum of its two best experts.
_LEAST_PER_GROUP = 2


def keep_best(trace: Trace, budget: Budget, scores: Sequence[Float[Tensor, " _"]]) -> Plan:
    """The plan that keeps the experts of highest score: as many in every layer as the budget allows.

    Every group of a layer keeps the same number. Of equal scores the lowest index is kept. Experts that
    the budget protects stay whatever their score.

    Args:
        trace: what was observed.
        budget: experts per layer, or bytes of the experts of all layers.
        scores: per layer of the trace, each expert's score.

    Raises:
        BudgetError: the budget asks for fewer experts than a token needs to choose from, or than it protects.
        UserError: a score is not finite, or an expert is protected that is not there.
    """
    check_protected(trace, budget)
    kept = num_kept(trace, budget)
    drops = []
    for layer, score in zip(trace.layers, scores, strict=True):
        if not torch.isfinite(score).all():
            raise UserError(
                f"an expert of layer {layer.index} has a score that is not finite; "
                "look for NaN or infinity in the model's weights"
            )
        lost = _worst(layer, score, kept, budget.protected.get(layer.index, ()))
        if lost:
            drops.append(Drop(layer.index, lost))
    return Plan(trace.source_digest, tuple(drops))


def num_kept(trace: Trace, budget: Budget) -> int:
    """The largest number of experts that every layer can keep within a budget.

    Raises:
        BudgetError: not even the smallest number that is possible fits; the message says it.
    """
    step = math.lcm(*(layer.num_groups for layer in trace.layers))
    whole = max((layer.shape.num_experts for layer in trace.layers), default=0)
    need = max((least_kept(layer, budget) for layer in trace.layers), default=0)
    counts = range(whole) if budget.counts is None else budget.counts
    possible = sorted({n for n in counts if n % step == 0 and need <= n < whole} | {whole})
    if budget.num_experts is not None:
        largest = min(budget.num_experts, whole)
        given, least = f"{budget.num_experts} experts per layer", f"{possible[0]} per layer"
    else:
        limit = budget.num_bytes or 0
        largest = next((n for n in range(whole, -1, -1) if num_bytes(trace, n) <= limit), -1)
        given, least = f"{limit} bytes of experts", f"{num_bytes(trace, possible[0])} bytes"
    if largest < possible[0]:
        raise BudgetError(
            f"{given} are too few by dropping experts alone: {_why(budget)} at least {possible[0]} in each "
            f"layer; give at least {least}, or store experts in fewer bits as well"
        )
    return max(n for n in possible if n <= largest)


def _why(budget: Budget) -> str:
    """What it is that needs a number of experts."""
    if budget.counts is not None:
        return "routing, protected experts and the numbers that a layer may have together need"
    return "a token chooses from" if not budget.protected else "routing and protected experts need"


def least_kept(layer: LayerTrace, budget: Budget | None = None) -> int:
    """The fewest experts a layer's router can choose from, the experts that a budget protects among them."""
    protected = 0 if budget is None else _most_protected(layer, budget)
    if layer.num_groups == 1:
        return max(layer.top_k, protected)
    return layer.num_groups * max(math.ceil(layer.top_k / layer.top_groups), _LEAST_PER_GROUP, protected)


def _most_protected(layer: LayerTrace, budget: Budget) -> int:
    """The most experts that a budget protects in one group of a layer."""
    size = layer.shape.num_experts // layer.num_groups
    held = Counter(expert // size for expert in set(budget.protected.get(layer.index, ())))
    return max(held.values(), default=0)


def num_bytes(trace: Trace, kept: int) -> int:
    """Bytes of all layers' experts with ``kept`` in each."""
    return sum(min(kept, layer.shape.num_experts) * layer.expert_num_bytes for layer in trace.layers)


def _worst(
    layer: LayerTrace, score: Float[Tensor, " E"], kept: int, protected: Sequence[int]
) -> tuple[int, ...]:
    """The experts a layer loses when it keeps the ``kept`` best, the same number from each group."""
    size = layer.shape.num_experts // layer.num_groups
    wanted = score.double().clone()
    wanted[list(protected)] = torch.inf
    order = torch.sort(wanted.view(layer.num_groups, size), dim=-1, descending=True, stable=True).indices
    lost = order[:, kept // layer.num_groups :] + size * torch.arange(layer.num_groups)[:, None]
    return tuple(sorted(lost.flatten().tolist()))
