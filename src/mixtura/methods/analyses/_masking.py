"""Experts that no token may choose, as steerings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mixtura.errors import UserError
from mixtura.methods.decoders import LayerFacts
from mixtura.types.steering import Steering


def steering(masked: Mapping[int, Sequence[int]], layers: Sequence[LayerFacts]) -> dict[int, Steering]:
    """Steerings under which tokens choose as if the experts that are named by layer were not there."""
    return {
        layer.index: as_if_without(layer.num_experts, masked[layer.index])
        for layer in layers
        if masked.get(layer.index)
    }


def as_if_without(num_experts: int, experts: Sequence[int]) -> Steering:
    """Logits of minus infinity before the family's own softmax or sigmoid, and never chosen after it."""
    allowed = torch.ones(num_experts, dtype=torch.bool)
    allowed[list(experts)] = False
    return Steering(logits=torch.zeros(num_experts).masked_fill(~allowed, -torch.inf), allowed=allowed)


def by_layer(
    name: str, pairs: Sequence[Sequence[int]], layers: Sequence[LayerFacts]
) -> dict[int, tuple[int, ...]]:
    """The experts of pairs of layer and expert, by layer; ``name`` is whose setting they are.

    Raises:
        UserError: a layer or an expert is not there, or fewer are left than a token chooses.
    """
    known = {layer.index: layer for layer in layers}
    found: dict[int, list[int]] = {}
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in known or not 0 <= pair[1] < known[pair[0]].num_experts:
            raise UserError(
                f"experts of {name} must be pairs of a layer ({', '.join(map(str, known))}) and one of "
                f"its experts, got {list(pair)}"
            )
        found.setdefault(pair[0], []).append(pair[1])
    for index, experts in found.items():
        layer = known[index]
        if layer.num_experts - len(set(experts)) < layer.top_k:
            raise UserError(
                f"experts of {name} must leave the {layer.top_k} of layer {index} that a token chooses, "
                f"got {len(set(experts))} masked of {layer.num_experts}"
            )
    return {index: tuple(sorted(set(experts))) for index, experts in found.items()}
