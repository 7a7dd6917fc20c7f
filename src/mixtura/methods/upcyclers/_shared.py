"""What several upcyclers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UnmetError, UserError
from mixtura.types import Action
from mixtura.types.upcycling import Build, Carry, DenseShape, DenseTrace, Recipe, SetRouter, array_name

# What stands outside of the experts: the first source's, or the average of all.
Rest = Literal["first", "average"]


def carried(rest: Rest, num_sources: int) -> Carry:
    """The action for what stands outside of the experts."""
    if rest == "first" or num_sources == 1:
        return Carry((0,), (1.0,))
    return Carry(tuple(range(num_sources)), (1.0 / num_sources,) * num_sources)


def one_each(sources: Sequence[DenseShape], num_experts: int) -> list[Action]:
    """Expert i of every layer is the feed-forward part of source i.

    Raises:
        UserError: there are not as many sources as experts.
    """
    if len(sources) != num_experts:
        raise UserError(
            f"one expert is made of each source here: {len(sources)} sources are {len(sources)} experts, not "
            f"{num_experts}; leave --experts out"
        )
    layers = range(sources[0].num_layers)
    return [Build(layer, expert, expert) for layer in layers for expert in range(num_experts)]


def with_rows(
    actions: Sequence[Action], num_layers: int, rows_of: Callable[[int], Float[Tensor, "E D"]]
) -> Recipe:
    """Actions and a router of given rows in every layer."""
    routers: list[Action] = []
    arrays = []
    for layer in range(num_layers):
        rows = rows_of(layer).float().contiguous()
        arrays.append(rows)
        routers.append(SetRouter(layer, "rows", rows=array_name(rows)))
    return Recipe.of([*actions, *routers], arrays)


def unit_rows(rows: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
    """Rows of length one; a row of zeros stays."""
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.clamp(min=1e-8)


def needed(trace: DenseTrace | None, method: str) -> DenseTrace:
    """The trace.

    Raises:
        UserError: there is none.
    """
    if trace is None:
        raise UserError(f"{method} needs what text shows of the dense model; give --prompts, or --text")
    return trace


def parts_of(width: int, parts: int, what: str) -> int:
    """The width of one of so many equal parts.

    Raises:
        UnmetError: they would not be equal; the numbers that would be are named.
    """
    if width % parts:
        possible = [n for n in range(2, min(width, 4 * parts) + 1) if width % n == 0]
        near = sorted(sorted(possible, key=lambda n: (abs(n - parts), -n))[:4])
        raise UnmetError(
            f"{what} is {width} wide, which {parts} equal parts do not make; numbers near that do: "
            f"{', '.join(map(str, near)) or 'none'}"
        )
    return width // parts


def drawn_rows(num_rows: int, width: int, std: float, seed: int, layer: int) -> Float[Tensor, "R D"]:
    """Rows from a normal distribution, others in each layer."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % (1 << 63))
    return torch.randn(num_rows, width, generator=generator) * std
