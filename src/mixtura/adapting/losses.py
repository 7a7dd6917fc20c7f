"""What adapters add to a model's loss, also where layers are computed again in the backward pass.

A layer attaches its loss to what it hands on. In the backward pass the model's own loss is met first: its
gradient says how the caller scales the loss, and each attached loss gets a gradient in the same measure. No
graph has to outlive its layer, so activation checkpointing of either kind is right; a layer that is computed
again finds its own pass, whatever passes came between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mixtura.rerouting.arguments import described
from mixtura.rerouting.passes import Pass, Passes


@final
@dataclass(slots=True)
class _Added:
    """What was added to the loss of one forward pass, and how the caller scales that loss."""

    total: Tensor | None = None
    factor: Tensor | None = None


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

    def valid(self, layer: nn.Module, num_rows: int) -> Bool[Tensor, " T"] | None:
        """Which of the rows that a layer was given are no padding; None where they are not the model's."""
        if self._passes is None:
            return None
        known = self._passes.of(layer).rows(num_rows)
        return None if known is None else known.valid

    def attach(self, layer: nn.Module, made: Tensor, loss: Tensor) -> Tensor:
        """What a layer made, with a loss that is learned from when it is."""
        here = Pass() if self._passes is None else self._passes.of(layer)
        added = self._of_pass.setdefault(here, _Added())
        share = 1.0 if here.share is None else here.share.to(loss.device)
        scaled = loss.float() * share
        if torch._C._current_graph_task_id() == -1:
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
