"""Causal attention of a router's own, over a sequence's tokens as far as they are known."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.methods._precision import exact, full_precision
from mixtura.methods._scores import masked, softmax
from mixtura.types import RouterInput


@full_precision()
def attended_before(
    values: Float[Tensor, "T W"],
    table: Float[Tensor, "S C W1"],
    inputs: RouterInput,
    matrices: Float[Tensor, "4 W W"],
    owner: str,
) -> Float[Tensor, "T W"]:
    """One head of attention of each token to its sequence's tokens up to itself, with rotary positions.

    Args:
        values: of the tokens at hand.
        table: values of all known tokens by sequence and position, as `by_position` makes it; a last
            column is positive where there is a token.
        inputs: whose positions and sequences are read.
        matrices: of query, key, value and output.
        owner: of the error.

    Raises:
        UserError: positions were not given.
    """
    places = inputs.need("positions", owner)
    query, key, value, out = (exact(part) for part in matrices)
    steps = torch.arange(table.shape[1], device=values.device)
    keys, queries = turned(table[..., :-1] @ key.T, steps), turned(values @ query.T, places)
    mixed = torch.zeros_like(values)
    for number, (sequence, known) in enumerate(zip(table, keys, strict=True)):
        rows = (inputs.sequences == number).nonzero().squeeze(-1)
        seen = (steps <= places[rows, None]) & (sequence[:, -1] > 0)
        near = softmax(masked(queries[rows] @ known.T / values.shape[1] ** 0.5, seen))
        mixed = mixed.index_copy(0, rows, near @ sequence[:, :-1] @ value.T)
    return mixed @ out.T


def turned(values: Float[Tensor, "*n W"], places: Int[Tensor, " P"]) -> Float[Tensor, "*n W"]:
    """Rotary positions: both halves of the values turned by angles that grow with the place."""
    first, second = values.chunk(2, dim=-1)
    size = second.shape[-1]
    angles = places[:, None] / 10000 ** (torch.arange(size, device=values.device) / size)
    cos, sin = angles.cos().to(values), angles.sin().to(values)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
