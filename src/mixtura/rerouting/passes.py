"""What is known of each forward pass of a model, also when parts of it are computed again.

Routers inside a model see bare rows. Here the model's own arguments (token ids, attention mask, cache)
are kept for them as a `Pass`. Activation checkpointing computes a layer again during the backward pass,
perhaps after other passes: a layer computed again finds its own pass by the very tensor it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_layers import GradientCheckpointingLayer

from mixtura.machine.releases import given_cache
from mixtura.types import Routing


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What the router of one layer returned: a family's own three tensors, or a router's `Routing`."""

    logits: Float[Tensor, "*_ E"] | None = None
    weights: Float[Tensor, "T K"] | None = None
    expert_ids: Int[Tensor, "T K"] | None = None
    routing: Routing | None = None


@final
@dataclass(slots=True, eq=False)
class Pass:
    """One forward pass.

    Attributes:
        number: passes before it.
        shape: rows and columns of the batch; None where the model was not given token ids or embeddings.
        valid: False for padding, for all tokens row by row.
        token_ids: vocabulary entries, where the model was given any.
        positions: each token's place in its sequence.
        past: tokens of each row that are in the cache already.
        training: whether the model is trained on it.
        share: the part of the batch's loss that this pass is, where the caller sums the parts' losses; None
            where the caller averages them.
        forced: by decoder layer, experts to choose instead of the router's own; -1 leaves them to it.
        seen: by decoder layer, what its router returned; kept while ``collecting``.
        states: by decoder layer, the state its router handed on.
    """

    number: int = 0
    shape: tuple[int, int] | None = None
    valid: Bool[Tensor, " T"] | None = None
    token_ids: Int[Tensor, " T"] | None = None
    positions: Int[Tensor, " T"] | None = None
    past: int = 0
    training: bool = False
    share: Tensor | None = None
    collecting: bool = False
    forced: dict[int, Int[Tensor, "T _"]] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, num_tokens: int) -> Pass | None:
        """This pass if its tokens are those of a router that was given so many rows, else None."""
        return self if self.valid is not None and len(self.valid) == num_tokens else None


@final
class Passes:
    """The pass that a model is in; kept by hooks, which `remove` takes away."""

    def __init__(self, model: nn.Module, gates: Sequence[str]) -> None:
        self.current = Pass()
        self.active: Pass | None = None
        self._of_input: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._handles = [
            handle
            for layer in _checkpointed(model, gates)
            for handle in (
                layer.register_forward_pre_hook(self._enter),
                *(child.register_forward_pre_hook(self._find) for child in layer.children()),
            )
        ]

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """A pass begins with these arguments of the model."""
        number = self.current.number + 1
        self.active = self.current = described(model, args, kwargs, number)
        return self.active

    def end(self) -> None:
        """The pass is over; what is computed from now on is computed again."""
        self.active = None

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.active is not None and args and isinstance(args[0], Tensor):
            self._of_input[args[0]] = self.active

    def _find(self, child: nn.Module, args: tuple[Any, ...]) -> None:
        if self.active is None and args and isinstance(args[0], Tensor):
            self.current = self._of_input.get(args[0], self.current)

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        # Tensors on their way through the model belong to the model, not to its copy.
        copied = Passes.__new__(Passes)
        memo[id(self)] = copied
        copied.current, copied.active, copied._of_input = Pass(), None, WeakIdKeyDictionary()
        copied._handles = list(self._handles)
        return copied


def described(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Pass:
    """What a model's arguments say of the tokens."""
    made = Pass(number=number, training=model.training and torch.is_grad_enabled())
    given = _bound(type(model).forward, model, args, kwargs)
    ids = given.get("input_ids")
    shown = ids if isinstance(ids, Tensor) else given.get("inputs_embeds")
    if not isinstance(shown, Tensor):
        return made
    rows, columns = shown.shape[:2]
    made.shape = (rows, columns)
    made.past = _length(given_cache(given))
    mask = given.get("attention_mask")
    plain = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] >= columns
    known = shown.new_ones((rows, made.past + columns), dtype=torch.bool)
    if isinstance(mask, Tensor) and plain:
        known = mask.to(torch.bool)
    made.valid = known[:, -columns:].reshape(-1)
    places = given.get("position_ids")
    if not (isinstance(places, Tensor) and places.ndim == 2 and places.shape[-1] == columns):
        places = (known.cumsum(-1) - 1).clamp(min=0)[:, -columns:]
    made.positions = places.expand(rows, columns).reshape(-1)
    made.token_ids = ids.reshape(-1) if isinstance(ids, Tensor) else None
    return made


def _bound(
    forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        bound = inspect.signature(forward).bind_partial(model, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    return dict(bound) | dict(bound.get("kwargs", {}))


def _length(cache: Any) -> int:
    """Tokens in a cache of keys and values."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _checkpointed(model: nn.Module, gates: Sequence[str]) -> list[nn.Module]:
    """The layers that activation checkpointing computes again, of those that hold a router."""
    found: dict[int, nn.Module] = {}
    for name in gates:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            owner = model.get_submodule(".".join(parts[:end]))
            if isinstance(owner, GradientCheckpointingLayer):
                found[id(owner)] = owner
                break
    return list(found.values())
