"""Can these experts go? The same answer for a model in memory and a checkpoint on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mixtura.checkpoints.viewing.base import LayerView
from mixtura.errors import UserError

Drops = Mapping[int, Collection[int]]


def check_drops(layers: Sequence[LayerView], drops: Drops) -> dict[int, tuple[int, ...]]:
    """The experts that stay in every layer, in order; all of them where nothing is dropped.

    Raises `UserError` for a layer or expert that is not there, a layer whose experts are fixed by
    token id, a layer left with fewer experts than each token chooses, and groups left uneven or too
    small for the router.
    """
    known = {layer.index: layer for layer in layers}
    for index in drops:
        if index not in known:
            numbers = ", ".join(map(str, known))
            raise UserError(f"layer {index} has no experts to drop; the layers with experts are {numbers}")
    return {layer.index: _kept(layer, drops.get(layer.index, ())) for layer in layers}


def least_kept(layer: LayerView) -> int:
    """The fewest experts the layer's router can choose from."""
    if layer.hash_routed:
        return layer.num_experts
    if layer.num_groups == 1:
        return layer.top_k
    # Routers with groups rank each by its two best experts.
    return layer.num_groups * max(2, -(-layer.top_k // layer.top_groups))


def _kept(layer: LayerView, dropped: Collection[int]) -> tuple[int, ...]:
    unknown = [expert for expert in dropped if not 0 <= expert < layer.num_experts]
    if unknown:
        raise UserError(
            f"layer {layer.index} has experts 0 to {layer.num_experts - 1}; there is no expert {unknown[0]}"
        )
    kept = tuple(expert for expert in range(layer.num_experts) if expert not in set(dropped))
    if not dropped:
        return kept
    if layer.hash_routed:
        raise UserError(
            f"layer {layer.index} sends every token id to experts fixed in a table, so none of them can be "
            "dropped; drop experts of the layers whose router is learned"
        )
    if len(kept) < layer.top_k:
        raise UserError(
            f"layer {layer.index} would keep {len(kept)} experts but each token chooses {layer.top_k}; "
            f"keep at least {layer.top_k}"
        )
    if layer.num_groups > 1:
        _check_groups(layer, kept)
    return kept


def _check_groups(layer: LayerView, kept: Sequence[int]) -> None:
    size = layer.num_experts // layer.num_groups
    held = Counter(expert // size for expert in kept)
    counts = [held[group] for group in range(layer.num_groups)]
    if len(set(counts)) > 1:
        raise UserError(
            f"layer {layer.index} would keep {min(counts)} to {max(counts)} experts in its groups of {size}; "
            f"drop the same number in each of its {layer.num_groups} groups"
        )
    least = least_kept(layer) // layer.num_groups
    if counts[0] < least:
        raise UserError(
            f"layer {layer.index} would keep {counts[0]} experts in each group; "
            f"its router needs at least {least}"
        )


def cut(tensor: Tensor, axis: int, kept: Sequence[int], num_experts: int) -> Tensor:
    """The entries of ``kept`` experts along ``axis``, and all entries beyond the first ``num_experts``."""
    extra = range(num_experts, tensor.shape[axis])
    rows = torch.tensor([*kept, *extra], dtype=torch.long, device=tensor.device)
    return tensor.index_select(axis, rows)
