"""Steering the routers of a whole step: what differs from the choices that they would make by themselves.

A step that runs in one compiled call has no routers that could be looked into. So what is to differ is told
here, for the passes within a ``with`` block: a decoder whose layers run together heeds it in that call, one
that cannot refuses the pass before anything of it has run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, final

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.kernels.compiled import native
from mixtura.types.steering import Steering

# What compiled calls can do, and the numbers in which they read it.
_FIELDS: Final = {
    "logits": torch.float32,
    "spread": torch.float32,
    "highest": torch.bool,
    "mixture": torch.float32,
    "share": torch.float32,
    "bias": torch.float32,
    "allowed": torch.bool,
    "ranks": torch.int64,
    "least": torch.float32,
    "scale": torch.float32,
}
_BY_TOKEN: Final = ("share", "least")


class UnsteeredError(Exception):
    """A pass that was to be steered cannot run in one compiled call; nothing of it has run."""


class Sizes(NamedTuple):
    """Of one layer: its experts, and how many a token has by itself."""

    num_experts: int
    top_k: int


@final
@dataclass(slots=True, eq=False)
class SteeredStep:
    """How the layers of a step are steered, as compiled calls read it; it may be used many times.

    Attributes:
        num_tokens: of the step.
        records: the extension's, by decoder layer.
        kept: by layers in which experts may be left out, how many each token of the last step had.
        tensors: what the records read.
        num_heeded: passes that were steered so.
    """

    num_tokens: int
    records: Mapping[int, Any]
    kept: Mapping[int, Int[Tensor, " T"]]
    tensors: list[Tensor] = field(default_factory=list)
    num_heeded: int = 0


_current: ContextVar[SteeredStep | None] = ContextVar("mixtura_steered_step", default=None)


def steered_step(
    steering: Mapping[int, Steering], sizes: Mapping[int, Sizes], num_tokens: int
) -> SteeredStep | None:
    """What compiled calls make of how each layer is steered; None where they cannot.

    Args:
        steering: by decoder layer; what has no row for each token is for all of them.
        sizes: by decoder layer.
        num_tokens: of the step.
    """
    extension = native()
    if extension is None or any(set(one.given) - _FIELDS.keys() for one in steering.values()):
        return None
    records: dict[int, Any] = {}
    kept: dict[int, Tensor] = {}
    tensors: list[Tensor] = []
    for index, one in steering.items():
        if one.idle:
            continue
        held = {name: _spread_out(name, getattr(one, name), num_tokens) for name in one.given}
        if one.ranks is not None or one.least is not None:
            held["kept"] = kept[index] = torch.zeros(num_tokens, dtype=torch.int64)
        num_experts, columns = sizes[index]
        if one.ranks is not None:
            columns = min(max(columns, int(one.ranks[..., 1].max())), num_experts)
        addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
        records[index] = extension.Steered(num_tokens, num_experts, columns, addresses)
        tensors += held.values()
    return SteeredStep(num_tokens, records, kept, tensors)


def _spread_out(name: str, given: Tensor, num_tokens: int) -> Tensor:
    """A row for each token, of numbers as compiled calls read them."""
    inner = () if name in _BY_TOKEN else given.shape[-1:]
    made = given.detach().to("cpu", _FIELDS[name]).expand(num_tokens, *inner).contiguous()
    # A router may be compared with what is infinite, and weighed by what is not: an end is an end.
    return made.clamp(min=0) if name == "ranks" else made


@contextmanager
def steering_steps(step: SteeredStep) -> Iterator[None]:
    """A pass in here is steered, or refused with `UnsteeredError`."""
    before, token = step.num_heeded, _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
    if step.num_heeded == before:
        raise RuntimeError("a model that runs no steps in one call was to be steered in one")


def current_steering() -> SteeredStep | None:
    """How the pass that begins now is to be steered; None for not at all."""
    return _current.get()
