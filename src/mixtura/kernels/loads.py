"""How many tokens each expert of a running model had, counted wherever experts run."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor, nn

_ATTRIBUTE: Final = "mixtura_loads"


def count_loads(experts: nn.Module, num_experts: int) -> Int[Tensor, " E"]:
    """Let an experts module count from now on; returns the counts, which grow while it runs.

    It costs nothing worth measuring and changes no path. A second call gives the counts that there are.
    """
    found = loads_of(experts)
    if found is None:
        found = torch.zeros(num_experts, dtype=torch.int64)
        setattr(experts, _ATTRIBUTE, found)
    return found


def loads_of(experts: nn.Module) -> Int[Tensor, " E"] | None:
    """The counts of an experts module; None where nobody asked for them."""
    found: Tensor | None = experts.__dict__.get(_ATTRIBUTE)
    return found


def count(loads: Int[Tensor, " E"], chosen: Int[Tensor, "..."]) -> None:
    """Count choices; those of no expert are absent."""
    ids = chosen.detach().reshape(-1).to("cpu", torch.int64)
    there = ids[(ids >= 0) & (ids < loads.shape[0])]
    loads += torch.bincount(there, minlength=loads.shape[0])
