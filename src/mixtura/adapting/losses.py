"""What adapters are told of a pass, hand on in it and add to its loss, also where layers are computed again.

A layer attaches its loss to what it hands on. In the backward pass the model's own loss is met first: its
gradient says how the caller scales the loss, and each attached loss gets a gradient in the same measure. No
graph has to outlive its layer, so activation checkpointing of either kind is right; a layer that is computed
again finds its own pass, whatever passes came between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mixtura.modeling.cache import recall, remember
from mixtura.rerouting.arguments import cache_of, described
from mixtura.rerouting.passes import Pass, Passes, goes_backward
from mixtura.types import Change, RouterInput


@final
@dataclass(slots=True)
class _Added:
    """What was added to the loss of one forward pass, how the caller scales that loss, and what is handed on.

    ``states`` and ``histories`` are by the adapter and what its sites share.
    """

    total: Tensor | None = None
    factor: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    histories: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@final
class LossBox:
    """The losses of all adapters of one model; kept by hooks on its forward.

    Attributes:
        last: what the last training pass added to the model's loss, or to none where it was given no labels.
        reads: whether some adapter decides by tokens, so that the model's arguments have to be understood.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.reads = False
        self._model: nn.Module | None = None
        self._passes: Passes | None = None
        self._of_pass: WeakKeyDictionary[Pass, _Added] = WeakKeyDictionary()

    def watch(self, model: nn.Module) -> None:
        """See a model's passes from now on; harmless where it is called again."""
        if self._model is model:
            return
        self._model = model
        names = [n for n, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
        self._passes = Passes(model, names)
        # A loss of one's own may be computed on the states of the model inside, called by itself.
        inside = [one for one in model.modules() if isinstance(one, PreTrainedModel) and one is not model]
        for owner in (model, *inside):
            owner.register_forward_pre_hook(self._before, with_kwargs=True)
            owner.register_forward_hook(self._after)
            owner.register_forward_hook(self._finally, always_call=True)
        object.__setattr__(model, "_mixtura_losses", self)

    def inputs(self, layer: nn.Module, x: Float[Tensor, "T cols"], shared: str) -> RouterInput:
        """What an adapter in a layer is told of the rows that the layer was given.

        Args:
            layer: where it is.
            x: the rows.
            shared: what tells the adapter, and what its sites share, from others.
        """
        here = self._pass_of(layer)
        known = here.rows(len(x))
        training = layer.training
        if known is None:
            return RouterInput.of(x, training=training)
        added = self._of_pass.get(here, _Added())
        told = {
            "valid": known.valid,
            "sequence_ids": known.sequence_ids,
            "positions": known.positions,
            "token_ids": known.token_ids,
            "state": added.states.get(shared),
        }
        if told["state"] is not None and len(told["state"]) != len(x):
            told["state"] = None
        given = {name: None if one is None else one.to(x.device) for name, one in told.items()}
        labels = {} if known.prompt is None else {"prompt": known.prompt.to(x.device).long()}
        history = recall(known.cache, shared) if known.past else {}
        return RouterInput.of(
            x, training=training, decoding=known.past > 0, labels=labels, history=history, **given
        )

    def keep(self, layer: nn.Module, change: Change, shared: str) -> None:
        """Hand on what a site made for those that come after it, in this pass and in later ones."""
        if change.state is None and not change.history:
            return
        added = self._of_pass.setdefault(self._pass_of(layer), _Added())
        if change.state is not None:
            added.states[shared] = change.state
        if change.history:
            added.histories[shared] = dict(change.history)

    def _pass_of(self, layer: nn.Module) -> Pass:
        return Pass() if self._passes is None else self._passes.of(layer)

    def attach(self, layer: nn.Module, made: Tensor, loss: Tensor) -> Tensor:
        """What a layer made, with a loss that is learned from when it is."""
        here = self._pass_of(layer)
        added = self._of_pass.setdefault(here, _Added())
        share = 1.0 if here.share is None else here.share.to(loss.device)
        scaled = loss.float() * share
        if not goes_backward():
            seen = scaled.detach()
            added.total = seen if added.total is None else added.total + seen.to(added.total.device)
        return cast(Tensor, _Attach.apply(made, scaled, added))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes = self._passes
        if not self.reads or passes is None or passes.active is not None:
            return
        passes.begin(model, described(model, args, kwargs, passes.number + 1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        passes = self._passes
        if passes is None or passes.owner is not model or passes.active is None:
            return output
        added = self._of_pass.get(passes.active, _Added())
        # A cache that the model made itself is first seen in what it returns.
        cache = passes.active.cache if passes.active.cache is not None else cache_of(output)
        if added.histories and cache is not None:
            remember(cache, added.histories)
        self.last = added.total
        return output if added.total is None else _tied(output, added)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finally(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._passes is not None and self._passes.owner is model:
            self._passes.end()

    def __deepcopy__(self, memo: dict[int, Any]) -> LossBox:
        if id(self._model) not in memo:
            # A part of the model is copied, which still runs within the passes of the whole.
            return self
        copied = memo[id(self)] = LossBox()
        copied.reads, copied._model = self.reads, memo[id(self._model)]
        copied._passes = None if self._passes is None else self._passes.__deepcopy__(memo)
        return copied


def _tied(output: Any, added: _Added) -> Any:
    """A model's output, its loss with what was added where it has one that is learned from."""
    loss = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad) or added.total is None:
        return output
    tied = _Tie.apply(loss, added.total.to(loss.device), added)  # type: ignore[no-untyped-call]
    if isinstance(output, tuple):
        return (tied, *output[1:])
    output.loss = tied
    return output


@final
class _Tie(Function):
    """A model's loss with what was added; notes how it is scaled when it is learned from."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, added: _Added) -> Tensor:
        ctx.added = added
        return loss + total.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.added.factor = grad.detach()
        return grad, None, None


@final
class _Attach(Function):
    """Hands a tensor on; its backward gives a loss the gradient that the model's own loss got."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, loss: Tensor, added: _Added) -> Tensor:
        ctx.added, ctx.like = added, (loss.dtype, loss.device)
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, device = ctx.like
        factor = ctx.added.factor
        # Where the caller makes a loss of its own, an adapter's counts as it is.
        known = torch.ones((), dtype=dtype, device=device) if factor is None else factor.to(device, dtype)
        return grad, known, None
