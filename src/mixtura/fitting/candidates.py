"""Candidates for a budget: uniform ones, and ones that give each part what it is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from mixtura.errors import BudgetError
from mixtura.fitting.allocate import allocate
from mixtura.fitting.records import Candidate, Parts, Prices

MOST_BLOCKS = 8


def choice_bytes(prices: Prices, choice: Sequence[int] | Int[ndarray, " M"]) -> int:
    """Bytes the parts take under a choice."""
    chosen = np.asarray(choice)
    return int(prices.num_bytes[np.arange(len(chosen)), chosen].sum())


def uniform(prices: Prices, option: int) -> Candidate:
    """Every part in the same way."""
    palette = prices.palette
    label = "unchanged" if option == palette.keep else f"uniform {palette.names[option]}"
    return Candidate(label, tuple([option] * len(prices.errors)))


def smallest(prices: Prices) -> Candidate:
    """The smallest model that still runs: two bits, and no more experts than a token chooses."""
    return drop_evenly(prices, prices.load.astype(float), prices.palette.stored[-1], most=True)


def drop_evenly(
    prices: Prices,
    importance: Float[ndarray, " M"],
    option: int,
    budget_bytes: int | None = None,
    *,
    most: bool = False,
) -> Candidate:
    """Every layer loses the same share of its experts, the least important; the rest take one width.

    The share is the least with which the budget holds; with ``most`` it is the largest possible.

    Raises:
        BudgetError: no share meets the budget.
    """
    experts, palette = prices.parts, prices.palette
    if palette.drop is None:
        raise BudgetError("no part of this model can be dropped")
    layers = list(dict.fromkeys(experts.layers.tolist()))
    sizes = {layer: int(experts.of_layer(layer).sum()) for layer in layers}
    steps = range(max(sizes.values()) + 1)
    for step in reversed(steps) if most else steps:
        chosen = np.full(len(importance), option, dtype=np.int64)
        for layer in layers:
            lost = sizes[layer] * step // max(sizes.values())
            groups = experts.num_groups[layer]
            lost = min(lost - lost % groups, sizes[layer] - experts.least_kept[layer])
            chosen[_least(importance, experts, layer, lost)] = palette.drop
        if most or budget_bytes is None or choice_bytes(prices, chosen) <= budget_bytes:
            dropped = int((chosen == palette.drop).sum())
            width = "full width" if option == palette.keep else palette.names[option]
            label = f"{width}, {dropped} experts dropped evenly"
            return Candidate(label, tuple(chosen.tolist()))
    raise BudgetError("no even share of dropped experts meets the budget")


def _least(importance: Float[ndarray, " M"], experts: Parts, layer: int, lost: int) -> Int[ndarray, " X"]:
    """Places of a layer's least important experts, the same number from each group."""
    places = np.flatnonzero(experts.of_layer(layer))
    groups = np.split(places, experts.num_groups[layer])
    each = lost // len(groups)
    return np.concatenate([group[np.argsort(importance[group], kind="stable")[:each]] for group in groups])


def mixed(
    prices: Prices,
    scale: Float[ndarray, " M"],
    budget_bytes: int,
    label: str,
    *,
    drop_scale: float | None = None,
    dropped: Bool[ndarray, " M"] | None = None,
) -> Candidate:
    """The least predicted loss within the budget, expert by expert.

    Args:
        scale: predicted KL per unit of error, by expert.
        drop_scale: the same for dropping relative to fewer bits; `None` forbids dropping.
        dropped: experts that are gone already.

    Raises:
        BudgetError: nothing within the rules is small enough.
    """
    losses = prices.errors * scale[:, None]
    drop = prices.palette.drop
    if drop is not None:
        losses[:, drop] = np.inf if drop_scale is None else losses[:, drop] * drop_scale
        if drop_scale is not None:
            _protect(losses, prices, drop)
        if dropped is not None:
            losses[dropped] = np.inf
            losses[dropped, drop] = 0.0
    return Candidate(label, tuple(allocate(losses, prices.num_bytes, budget_bytes).tolist()))


def _protect(losses: Float[ndarray, "M O"], prices: Prices, drop: int) -> None:
    """Forbid dropping the experts without which a layer or group could not choose enough."""
    experts = prices.parts
    for layer in dict.fromkeys(experts.layers.tolist()):
        groups = experts.num_groups[layer]
        places = np.flatnonzero(experts.of_layer(layer))
        if groups > 1:
            # A group-limited router needs equal groups; only even drops keep them so.
            losses[places, drop] = np.inf
            continue
        order = places[np.argsort(-losses[places, drop], kind="stable")]
        losses[order[: experts.least_kept[layer]], drop] = np.inf


def blocks(prices: Prices) -> list[Bool[ndarray, " M"]]:
    """Parts whose errors cost the same: neighbouring layers in at most `MOST_BLOCKS` groups, as masks."""
    if prices.blocks:
        return list(prices.blocks)
    layers = np.array(list(dict.fromkeys(prices.parts.layers.tolist())))
    groups = np.array_split(layers, min(MOST_BLOCKS, len(layers)))
    return [np.isin(prices.parts.layers, group) for group in groups]
