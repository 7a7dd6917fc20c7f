"""What adapters add to a model's loss, also where layers are computed again in the backward pass.

A layer attaches its loss to what it hands on. In the backward pass the model's own loss is met first: its
gradient says how the caller scales the loss, and each attached loss gets a gradient in the same measure. No
graph has to outlive its layer, so activation checkpointing of either kind is right.
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd import Function


@final
class _Pass:
    """One forward pass: what was added, in what measure, and which tokens count."""

    def __init__(self, share: Tensor | None, mask: Tensor | None) -> None:
        self.share, self.mask = share, mask
        self.total: Tensor | None = None
        self.factor: Tensor | None = None


@final
class LossBox:
    """The losses of all adapters of one model; kept by hooks on its forward.

    Attributes:
        last: what the last training pass added to the model's loss, or to none where it was given no labels.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self._now = _Pass(None, None)

    def watch(self, model: nn.Module) -> None:
        """See a model's passes from now on; harmless where it is called again."""
        if getattr(model, "_mixtura_losses", None) is not self:
            model.register_forward_pre_hook(self._before, with_kwargs=True)
            model.register_forward_hook(self._after)
            object.__setattr__(model, "_mixtura_losses", self)

    def valid(self, num_rows: int, length: int) -> Tensor | None:
        """Which of a layer's rows are no padding; None where the model was not told of these rows."""
        mask = self._now.mask
        if mask is None or mask.ndim != 2 or length > mask.shape[1] or mask.shape[0] * length != num_rows:
            return None
        return mask[:, mask.shape[1] - length :].reshape(-1).bool()

    def attach(self, made: Tensor, loss: Tensor) -> Tensor:
        """What a layer made, with a loss that is learned from when it is."""
        here = self._now
        share = 1.0 if here.share is None else here.share.to(loss.device)
        scaled = loss.float() * share
        if torch._C._current_graph_task_id() == -1:
            seen = scaled.detach()
            here.total = seen if here.total is None else here.total + seen.to(here.total.device)
        return cast(Tensor, _Attach.apply(made, scaled, here))  # type: ignore[no-untyped-call]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        share = None
        if isinstance(labels, Tensor) and items is not None:
            share = (labels[..., 1:] != -100).sum() / torch.as_tensor(items, device=labels.device).clamp(
                min=1
            )
        mask = kwargs.get("attention_mask")
        self._now = _Pass(share, mask if isinstance(mask, Tensor) else None)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        here = self._now
        self.last = here.total
        loss = getattr(output, "loss", None)
        if here.total is not None and isinstance(loss, Tensor) and loss.requires_grad:
            output.loss = _Tie.apply(loss, here.total.to(loss.device), here)  # type: ignore[no-untyped-call]
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> LossBox:
        # Hooks of a copied model still name the first one's box: share it.
        return self


@final
class _Tie(Function):
    """A model's loss with what was added; notes how it is scaled when it is learned from."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, here: _Pass) -> Tensor:
        ctx.here = here
        return loss + total.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.here.factor = grad.detach()
        return grad, None, None


@final
class _Attach(Function):
    """Hands a tensor on; its backward gives a loss the gradient that the model's own loss got."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, loss: Tensor, here: _Pass) -> Tensor:
        ctx.here, ctx.like = here, (loss.dtype, loss.device)
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, device = ctx.like
        factor = ctx.here.factor
        # Where the caller makes a loss of its own, an adapter's counts as it is.
        known = torch.ones((), dtype=dtype, device=device) if factor is None else factor.to(device, dtype)
        return grad, known, None
