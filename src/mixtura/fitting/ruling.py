"""Mixtures by allocators that are named: their predicted losses, and the least of these within the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, final

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mixtura.checkpoints.view import LayerView
from mixtura.errors import SettingError, UserError
from mixtura.fitting.allocate import allocate
from mixtura.fitting.records import Candidate, Prices, Request
from mixtura.methods import create, header
from mixtura.methods.allocators import ExpertsSeen

KIND: Final = "allocators"


@final
class Rule(NamedTuple):
    """What an allocator makes of what was observed.

    Attributes:
        name: of the allocator.
        losses: that it predicts; infinite for ways that cannot be had.
        by_layer: whether every layer has the same share of its bytes left.
    """

    name: str
    losses: Float[ndarray, "M O"]
    by_layer: bool


def check_allocators(request: Request) -> None:
    """Refuse allocators that there are not, or where tensors and not experts are stored.

    Raises:
        UserError: says which, and what there is.
    """
    for name in request.allocators:
        create(KIND, name)
    if request.allocators and request.form != "mixtura":
        raise SettingError(
            f"--allocate shares bits out among experts, and --format {request.form} stores them all in one "
            f"type a tensor; leave one of them out"
        )


def source_bits(layers: Sequence[LayerView]) -> float:
    """Bits of a weight of experts as they are: of their matrices, the mean over all layers."""
    bits = weights = 0
    for layer in layers:
        tensors = layer.native_expert(0)
        for matrix in (tensors.up, tensors.down):
            bits += layer.num_experts * 8 * matrix.nbytes
            weights += layer.num_experts * matrix.numel()
    return bits / weights


def rules_of(names: Sequence[str], prices: Prices, whole_bits: float) -> tuple[Rule, ...]:
    """What the named allocators make of the prices of experts, whose weights have so many bits each."""
    return tuple(_rule(name, prices, whole_bits) for name in names)


def _rule(name: str, prices: Prices, whole_bits: float) -> Rule:
    ways = [prices.palette.keep, *prices.stored]
    sizes = prices.num_bytes[:, ways].sum(0)
    if prices.weights is None:
        raise UserError(
            "what was observed before has no routing weights, which --allocate needs; remove the directory "
            "of the unfinished fit and begin anew"
        )
    seen = ExpertsSeen(
        np.unique(prices.parts.layers, return_inverse=True)[1],
        prices.load,
        prices.weights,
        whole_bits * sizes / sizes[0],
        prices.errors[:, ways],
    )
    losses = np.full_like(prices.errors, np.inf)
    losses[:, ways] = create(KIND, name).losses(seen)
    return Rule(name, losses, "by_layer" in header(KIND, name).tags)


def ruled(prices: Prices, rule: Rule, budget_bytes: int) -> Candidate:
    """The ways of least predicted loss within the budget, over all experts or layer by layer.

    Raises:
        BudgetError: the smallest ways take more.
    """
    label = f"allocated by {rule.name}"
    if not rule.by_layer:
        return Candidate(label, tuple(allocate(rule.losses, prices.num_bytes, budget_bytes).tolist()))
    chosen = np.zeros(len(rule.losses), dtype=np.int64)
    keep = prices.num_bytes[:, prices.palette.keep]
    for layer in dict.fromkeys(prices.parts.layers.tolist()):
        mask = prices.parts.of_layer(layer)
        share = budget_bytes * int(keep[mask].sum()) // int(keep.sum())
        chosen[mask] = allocate(rule.losses[mask], prices.num_bytes[mask], share)
    return Candidate(label, tuple(chosen.tolist()))
