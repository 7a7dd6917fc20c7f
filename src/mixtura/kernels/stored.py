"""Gradients of the inputs of experts that live in an `ExpertStore`: their weights are read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mixtura.errors import UserError
from mixtura.kernels.adapted import Added, changed_expert, tensors_of
from mixtura.kernels.dispatch import Dispatch, sum_by_token
from mixtura.kernels.experts import ExpertMath, run_experts
from mixtura.kernels.matmul import linear
from mixtura.kernels.records import AssignmentObserver, ExpertStore, ExpertTensors
from mixtura.kernels.training import dot_rows
from mixtura.methods._precision import full_precision
from mixtura.types import Change, LowRank, Own


def run_stored_with_grad(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, " n"],
    dispatch: Dispatch,
    store: ExpertStore,
    math: ExpertMath,
    observer: AssignmentObserver | None = None,
    parameters: Sequence[Tensor] = (),
    changes: Sequence[Change] = (),
    trained: Sequence[Tensor] = (),
) -> Float[Tensor, "T D"]:
    """What `run_experts` computes, differentiable in tokens and weights but not in the experts.

    Nothing dense is kept for the backward pass, which asks the store for each expert once more.
    ``parameters`` are those of the experts module; where one of them would need a gradient, the
    backward pass raises. ``changes`` are what adapters make of the experts' matrices, and ``trained`` the
    tensors of those, which get gradients.

    Raises:
        UserError: in the backward pass, a parameter of the experts requires a gradient.
    """
    call = _Call(dispatch, store, math, observer)
    if changes:
        made = _ChangedExperts.apply(x, weights, call, tuple(changes), *trained)  # type: ignore[no-untyped-call]
        return cast(Tensor, made)
    return cast(Tensor, _StoredExperts.apply(x, weights, call, *parameters))  # type: ignore[no-untyped-call]


class _Call(NamedTuple):
    dispatch: Dispatch
    store: ExpertStore
    math: ExpertMath
    observer: AssignmentObserver | None


@final
class _StoredExperts(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, call: _Call, *parameters: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weights)
        return run_experts(x, weights, *call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[3:]):
            raise UserError(
                "experts that are read from a store cannot be trained; call requires_grad_(False) on the "
                "experts for gradients of their inputs alone, or load the model unpacked to train it"
            )
        x, weights = ctx.saved_tensors
        dispatch, store, math, _ = ctx.call
        grad_rows = x.new_empty(dispatch.num_rows, x.shape[1])
        grad_weights = torch.empty_like(weights)
        for expert, start, stop in dispatch.runs:
            token_ids = dispatch.rows[start:stop]
            inputs = x.index_select(0, token_ids).requires_grad_()
            with torch.enable_grad():
                outputs = _run_expert(inputs, store.get(expert, x.dtype), math)
            grad_outputs = grad.index_select(0, token_ids)
            grad_weights[start:stop] = dot_rows(grad_outputs, outputs.detach())
            weighted = (grad_outputs * weights[start:stop, None]).to(outputs.dtype)
            (grad_rows[start:stop],) = torch.autograd.grad(outputs, inputs, weighted)
        unused = (None,) * (len(ctx.needs_input_grad) - 2)
        return sum_by_token(grad_rows, dispatch), grad_weights, *unused


@final
class _ChangedExperts(Function):
    """Experts of a store as adapters change them, one after the other; each is decoded twice, none kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, call: _Call, changes: tuple[Change, ...], *trained: Tensor
    ) -> Tensor:
        ctx.call, ctx.changes = call, changes
        ctx.save_for_backward(x, weights, *trained)
        outputs = x.new_empty(call.dispatch.num_rows, x.shape[1])
        for expert, start, stop in call.dispatch.runs:
            token_ids = call.dispatch.rows[start:stop]
            inputs = x.index_select(0, token_ids)
            tensors = call.store.get(expert, x.dtype)
            outputs[start:stop] = _run_changed(inputs, token_ids, tensors, expert, changes, call.math)
            if call.observer is not None:
                call.observer.expert(
                    expert, token_ids, weights[start:stop], inputs.detach(), outputs[start:stop]
                )
        return sum_by_token(outputs, call.dispatch, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *trained = ctx.saved_tensors
        dispatch, store, math, _ = ctx.call
        leaves = [tensor.detach().requires_grad_() for tensor in trained]
        swapped = dict(zip(map(id, _tensors(ctx.changes)), leaves, strict=True))
        changes = tuple(_with_tensors(change, swapped) for change in ctx.changes)
        grad_rows = x.new_empty(dispatch.num_rows, x.shape[1])
        grad_weights = torch.empty_like(weights)
        for expert, start, stop in dispatch.runs:
            token_ids = dispatch.rows[start:stop]
            inputs = x.index_select(0, token_ids).requires_grad_()
            with torch.enable_grad():
                tensors = store.get(expert, x.dtype)
                outputs = _run_changed(inputs, token_ids, tensors, expert, changes, math)
            grad_outputs = grad.index_select(0, token_ids)
            grad_weights[start:stop] = dot_rows(grad_outputs, outputs.detach())
            weighted = (grad_outputs * weights[start:stop, None]).to(outputs.dtype)
            # Gradients of the adapters' tensors add up in the leaves, expert by expert.
            torch.autograd.backward(outputs, weighted)
            assert inputs.grad is not None
            grad_rows[start:stop] = inputs.grad
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return sum_by_token(grad_rows, dispatch), grad_weights, None, None, *grads


def _tensors(changes: Sequence[Change]) -> list[Tensor]:
    return [tensor for change in changes for tensor in tensors_of(change)]


def _with_tensors(change: Change, swapped: Mapping[int, Tensor]) -> Change:
    """The change made of other tensors, which stand in for those of an identity."""
    parts: dict[str, LowRank | Own] = {}
    for name, part in change.matrices.items():
        if isinstance(part, Own):
            parts[name] = Own(swapped[id(part.weight)])
        else:
            parts[name] = LowRank(swapped[id(part.a)], swapped[id(part.b)], part.scale)
    return replace(change, matrices=parts)


@full_precision()
def _run_changed(
    x: Tensor,
    token_ids: Tensor,
    tensors: ExpertTensors,
    expert: int,
    changes: Sequence[Change],
    math: ExpertMath,
) -> Tensor:
    tensors, added = changed_expert(tensors, expert, changes)
    hidden = math.activation(_sum(x, token_ids, math.matrix(tensors.up), tensors.up_bias, added["up"]))
    outputs = _sum(hidden, token_ids, math.matrix(tensors.down), tensors.down_bias, added["down"])
    return outputs if math.post is None else math.post(outputs)


def _sum(x: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor | None, added: Sequence[Added]) -> Tensor:
    # Without gradients by the very kernel of experts that nothing is added to, so that zeros add nothing.
    made = F.linear(x, weight, bias) if torch.is_grad_enabled() else linear(x, weight, bias)
    for a, b, scale, tokens in added:
        thin = F.linear(x.to(a.dtype), a)
        if tokens is not None:
            thin = thin * tokens.index_select(0, token_ids)[:, None]
        made = made + (scale * F.linear(thin, b)).to(made.dtype)
    return made


def _run_expert(x: Tensor, tensors: ExpertTensors, math: ExpertMath) -> Tensor:
    hidden = math.activation(F.linear(x, math.matrix(tensors.up), tensors.up_bias))
    outputs = F.linear(hidden, math.matrix(tensors.down), tensors.down_bias)
    return outputs if math.post is None else math.post(outputs)
