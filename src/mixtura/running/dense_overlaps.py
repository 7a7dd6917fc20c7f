"""How much of each expert's neurons every token activates in a dense model, layer by layer from disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.dense.view import DenseView
from mixtura.data.tokens import TokenBatch
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed

_LEVELS = 5
_UNBOUNDED = 1 << 62


def overlaps(
    view: DenseView, tokens: TokenBatch, neurons: Sequence[Sequence[Int[Tensor, " _"]]]
) -> Float[Tensor, "L S T E"]:
    """By layer, token and expert, how many of the token's most active neurons are the expert's.

    A neuron counts once for each of five sets that it is in: the most active 1/5, 2/5 and so on of as many as
    the expert has; a third of the sum is divided by how many it has. Zero for padding.

    Args:
        view: the dense model.
        tokens: the text.
        neurons: by layer and expert; experts of one layer have as many.
    """
    size = tokens.input_ids.shape
    streamed = Streamed(view)
    found = torch.zeros(len(neurons), *size, len(neurons[0]))
    place: dict[str, Tensor] = {}

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            rows, valid = place["rows"], place["valid"]
            found[layer][rows[:, None].expand_as(valid)[valid], _columns(valid)] = shares_of(
                given[0][valid].float().abs(), neurons[layer]
            )

        return hook

    downs = [block.get_submodule("mlp.down_proj") for block in streamed.blocks]
    handles = [down.register_forward_pre_hook(hook_of(layer)) for layer, down in enumerate(downs)]
    for rows in streamed.batches(*size, max_bytes=DEFAULT_WORKING_BYTES):
        place.update(rows=rows, valid=tokens.attention_mask[rows].bool())
        streamed.hidden(tokens.input_ids[rows], tokens.attention_mask[rows], max_bytes=_UNBOUNDED)
    for handle in handles:
        handle.remove()
    return found


def shares_of(
    activations: Float[Tensor, "T F"], neurons: Sequence[Int[Tensor, " M"]]
) -> Float[Tensor, "T E"]:
    """That number of each token and expert, of the absolute activations of one layer."""
    number = len(neurons[0])
    ranks = activations.argsort(dim=1, descending=True).argsort(dim=1)
    counted = torch.zeros_like(activations)
    for level in range(1, _LEVELS + 1):
        counted += ranks < max(1, number * level // _LEVELS)
    return torch.stack([counted[:, ids.long()].sum(1) for ids in neurons], 1) / (3 * number)


def _columns(valid: Tensor) -> Tensor:
    return valid.nonzero()[:, 1]
