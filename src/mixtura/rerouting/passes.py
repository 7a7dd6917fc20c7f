"""What is known of each forward pass of a model, also when parts of it are computed again.

Routers inside a model see bare rows. Here what the model's own arguments say of them (token ids, attention
mask, cache) is kept for them as a `Pass`. Activation checkpointing computes a layer again during the
backward pass, perhaps after other passes: a layer computed again finds its own pass by the very tensor it
was given. A router that runs outside of any pass, because somebody calls a layer by itself, has a pass of
its own of which nothing is known.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_layers import GradientCheckpointingLayer

from mixtura.checkpoints.viewing.wrappers import submodule
from mixtura.types import Routing
from mixtura.types.steering import Steering


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What the router of one layer returned: a family's own three tensors, or a router's `Routing`."""

    logits: Float[Tensor, "*_ E"] | None = None
    weights: Float[Tensor, "T K"] | None = None
    expert_ids: Int[Tensor, "T K"] | None = None
    routing: Routing | None = None


@final
@dataclass(slots=True, weakref_slot=True, eq=False)
class Pass:
    """One forward pass.

    Attributes:
        number: passes before it.
        shape: rows and columns of the batch; None where the model was not given token ids or embeddings.
        valid: False for padding, for all tokens row by row.
        token_ids: vocabulary entries, where the model was given any.
        positions: each token's place in its sequence.
        sequence_ids: for each token the number of its sequence in the batch; several may be packed in a row.
        prompt: tokens before the first that a sequence's labels ask for; None where there are no labels.
        past: tokens of each row that are in the cache already.
        cache: the cache that it goes on from or fills.
        training: whether the model is trained on it.
        num_labels: labels that the model's loss is over; None where it was given none.
        num_items: what the caller divides the sum of the labels' losses by; None where it averages passes.
        without_gradient: whether a router ran without a graph though the pass is trained on, as those of
            layers do that reentrant activation checkpointing will compute again.
        forced: by decoder layer, experts to choose instead of the router's own; -1 leaves them to it.
        steering: by decoder layer, how its choice is to differ from the router's own.
        kept: by decoder layer, how many of each token's experts were left where some were left out.
        seen: by decoder layer, what its router returned; kept while ``collecting``.
        states: by decoder layer, the state its router handed on.
    """

    number: int = 0
    shape: tuple[int, int] | None = None
    valid: Bool[Tensor, " T"] | None = None
    token_ids: Int[Tensor, " T"] | None = None
    positions: Int[Tensor, " T"] | None = None
    sequence_ids: Int[Tensor, " T"] | None = None
    prompt: Bool[Tensor, " T"] | None = None
    past: int = 0
    cache: Any = None
    training: bool = False
    num_labels: Tensor | None = None
    num_items: Tensor | None = None
    without_gradient: bool = False
    collecting: bool = False
    forced: dict[int, Int[Tensor, "T _"]] = field(default_factory=dict)
    steering: dict[int, Steering] = field(default_factory=dict)
    kept: dict[int, Int[Tensor, " T"]] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def share(self) -> Tensor | None:
        """The part of the whole batch's loss that this pass is, where the caller sums the parts' losses.

        A `Trainer` that accumulates gradients hands the model the number of labels of all parts, by which it
        divides each part's loss; else the caller averages, every part counts in full, and this is None. Where
        no part has a label, no part counts.
        """
        if self.num_items is None or self.num_labels is None:
            return None
        return self.num_labels / self.num_items.clamp(min=1)

    def rows(self, num_tokens: int) -> Pass | None:
        """This pass if its tokens are those of a router that was given so many rows, else None."""
        return self if self.valid is not None and len(self.valid) == num_tokens else None


@final
class Passes:
    """The pass that a model is in; kept by hooks, which `remove` takes away.

    Attributes:
        number: passes begun so far.
        active: the pass that the model is in; None between passes.
        owner: the module whose forward the active pass is.
        num_outside: how often routers were trained outside of any pass.
    """

    def __init__(self, model: nn.Module, gates: Sequence[str]) -> None:
        self.number = 0
        self.active: Pass | None = None
        self.owner: nn.Module | None = None
        self.num_outside = 0
        self._latest = Pass()
        self._of_input: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._layers = _checkpointed(model, gates)
        self._handles: list[Any] = []
        self.hook()

    def hook(self) -> None:
        """Begin to look at layers, or begin again after `remove`."""
        self._handles = [
            handle
            for layer in self._layers
            for handle in (
                layer.register_forward_pre_hook(self._enter),
                *(child.register_forward_pre_hook(self._find) for child in layer.children()),
            )
        ]

    def begin(self, owner: nn.Module, here: Pass) -> None:
        """A pass of ``owner`` begins."""
        self.number += 1
        self.active = self._latest = here
        self.owner = owner

    def end(self) -> None:
        """The pass is over."""
        # Tensors of the pass and all they were computed from would live until the next one.
        self._latest.seen.clear()
        self._latest.cache = None
        self.active = self.owner = None

    def of(self, router: nn.Module) -> Pass:
        """The pass that a router which runs now is in."""
        if self.active is not None:
            return self.active
        if goes_backward():
            return self._latest
        made = self._unknown(router)
        self.num_outside += made.training
        return made

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _unknown(self, module: nn.Module) -> Pass:
        return Pass(number=self.number, training=module.training and torch.is_grad_enabled())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not goes_backward() and args and isinstance(args[0], Tensor):
            self._of_input[args[0]] = self._unknown(layer) if self.active is None else self.active

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find(self, child: nn.Module, args: tuple[Any, ...]) -> None:
        if self.active is None and goes_backward() and args and isinstance(args[0], Tensor):
            self._latest = self._of_input.get(args[0]) or self._alias(args[0]) or self._latest

    def _alias(self, given: Tensor) -> Pass | None:
        """The pass of an input of which this is another name: reentrant checkpointing detaches inputs."""
        for known, here in self._of_input.items():
            if known.data_ptr() == given.data_ptr() and known.shape == given.shape and given.is_leaf:
                assert isinstance(here, Pass)
                return here
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        # Tensors on their way through the model belong to the model, not to its copy.
        copied = Passes.__new__(Passes)
        memo[id(self)] = copied
        copied.number, copied.active, copied.owner, copied.num_outside = self.number, None, None, 0
        copied._latest, copied._of_input = Pass(), WeakIdKeyDictionary()
        copied._handles = list(self._handles)
        copied._layers = [copy.deepcopy(layer, memo) for layer in self._layers]
        return copied


def goes_backward() -> bool:
    """Whether this is computed during a backward pass, where layers are only ever computed again."""
    return torch._C._current_graph_task_id() != -1


def _checkpointed(model: nn.Module, gates: Sequence[str]) -> list[nn.Module]:
    """The layers that activation checkpointing computes again, of those that hold a router."""
    found: dict[int, nn.Module] = {}
    for name in gates:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            owner = submodule(model, ".".join(parts[:end]))
            if isinstance(owner, GradientCheckpointingLayer):
                found[id(owner)] = owner
                break
    return list(found.values())
