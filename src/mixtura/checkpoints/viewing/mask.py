"""Masking experts: the router never selects them, and nothing is removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mixtura.checkpoints.viewing.droppable import Drops, check_drops
from mixtura.checkpoints.viewing.memory import MemoryLayer, MemoryView


@contextmanager
def masked(model: nn.Module, drops: Drops) -> Iterator[None]:
    """While this context lasts, ``model`` behaves as if it had not the experts in ``drops``.

    The score by which experts are selected becomes minus infinity, after any correction bias, so
    that also routers that select and weight by different scores never choose them. Raises
    `UserError` where experts could not be dropped.
    """
    view = MemoryView(model)
    check_drops(view.layers, drops)
    with ExitStack() as stack:
        for layer in view.layers:
            experts = sorted(drops.get(layer.index, ()))
            if experts:
                stack.enter_context(masked_layer(layer, experts))
        yield


@contextmanager
def masked_layer(layer: MemoryLayer, experts: Sequence[int]) -> Iterator[None]:
    """While this context lasts, the router of one layer never selects ``experts``."""
    bias = layer.correction_bias()
    held = None if bias is None else bias.clone()
    router: Any = layer.router
    own = vars(router).get("forward")
    weight = layer.tensor(layer.site.router_weight)
    mode = _MaskScores(tuple(weight.shape), layer.num_experts, experts)
    router.forward = _under(mode, router.forward)
    if bias is not None:
        bias[list(experts)] = -torch.inf
    try:
        yield
    finally:
        if bias is not None and held is not None:
            bias.copy_(held)
        if own is None:
            del router.forward
        else:
            router.forward = own


def _under(mode: TorchFunctionMode, forward: Callable[..., Any]) -> Callable[..., Any]:
    def masked_forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return masked_forward


@final
class _MaskScores(TorchFunctionMode):
    """Inside a router: masks its logits where they are made, and its scores where the best are taken.

    Masking the logits makes a softmax spread over the other experts alone. Masking again at the
    selection matters where the router has put other numbers in the place of scores in between, such
    as zeros for experts of groups that are not used.
    """

    def __init__(self, weight_shape: tuple[int, ...], num_experts: int, experts: Collection[int]) -> None:
        super().__init__()
        self._weight_shape = weight_shape
        self._num_experts = num_experts
        self._experts = list(experts)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, masked where it makes logits or takes the best scores."""
        options = dict(kwargs or {})
        if func in (torch.topk, Tensor.topk):
            args = (self._mask(args[0]), *args[1:])
        result = func(*args, **options)
        if func is F.linear and tuple(args[1].shape) == self._weight_shape:
            return self._mask(result)
        if func in (torch.mm, Tensor.mm) and tuple(args[1].shape) == self._weight_shape[::-1]:
            return self._mask(result)
        return result

    def _mask(self, scores: Tensor) -> Tensor:
        if scores.shape[-1] not in (self._num_experts, self._weight_shape[0]):
            return scores
        columns = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        columns[self._experts] = True
        return scores.masked_fill(columns, -torch.inf)
