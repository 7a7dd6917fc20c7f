"""Run experts with gradients: grouped linear layers whose backward writes each expert's once.

Selecting an expert's weights by indexing would make autograd build a gradient as large as all
experts for every expert that ran; here one gradient is allocated and each expert's part of it written
in place. What lies between the matrices (gate, norm) is left to autograd, on all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mixtura.kernels.dispatch import Dispatch, sum_by_token
from mixtura.kernels.experts import ExpertMath, StackedExperts
from mixtura.kernels.matmul import grouped_linear
from mixtura.kernels.records import AssignmentObserver

# Rows whose share of the output's gradient is gathered at once.
_BLOCK_ROWS = 256


class GroupedLayer(NamedTuple):
    """What a grouped linear layer needs beside its tensors.

    Attributes:
        name: which matrix of the experts it multiplies with, ``up`` or ``down``.
        dispatch: whose rows lie where.
        math: what the experts compute.
        from_tokens: its input has a row for each token, not for each assignment.
    """

    name: str
    dispatch: Dispatch
    math: ExpertMath
    from_tokens: bool

    def inputs(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The input's rows of one expert's run."""
        return x.index_select(0, self.dispatch.rows[start:stop]) if self.from_tokens else x[start:stop]


# Multiplies rows with their experts' matrices and adds the biases, differentiably.
Multiply: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, GroupedLayer], Tensor]


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: GroupedLayer) -> Tensor:
    """Every row's product with its expert's matrix, plus the bias."""
    return cast(Tensor, _GroupedLinear.apply(x, weight, bias, layer))  # type: ignore[no-untyped-call]


def run_experts_with_grad(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, " n"],
    dispatch: Dispatch,
    store: StackedExperts,
    math: ExpertMath,
    observer: AssignmentObserver | None = None,
    multiply: Multiply = grouped_product,
) -> Float[Tensor, "T D"]:
    """What `run_experts` computes, differentiable in tokens, weights, experts and norm.

    Once differentiable: gradients of gradients are refused by autograd.
    """
    x = x.to(store.up.dtype)
    hidden = multiply(x, store.up, store.up_bias, GroupedLayer("up", dispatch, math, True))
    inputs = math.activation(hidden).to(store.down.dtype)
    outputs = multiply(inputs, store.down, store.down_bias, GroupedLayer("down", dispatch, math, False))
    if math.post is not None:
        outputs = math.post(outputs)
    if observer is not None:
        for expert, start, stop in dispatch.runs:
            rows, ran = dispatch.rows[start:stop], slice(start, stop)
            seen = x.detach().index_select(0, rows)
            observer.expert(expert, rows, weights[ran].detach(), seen, outputs[ran].detach())
    return cast(Tensor, _Combine.apply(outputs, weights, dispatch))  # type: ignore[no-untyped-call]


@final
class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: GroupedLayer) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)
        matrices = layer.math.matrix(weight)
        rows = x.index_select(0, layer.dispatch.rows) if layer.from_tokens else x
        return grouped_linear(rows, matrices, bias, layer.dispatch.runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            grad_of_inputs(grad, weight, ctx.layer) if wants_x else None,
            _grad_of_weight(grad, x, weight, ctx.layer) if wants_weight else None,
            _grad_of_bias(grad, bias, ctx.layer) if wants_bias else None,
            None,
        )


def grad_of_inputs(grad: Tensor, weight: Tensor, layer: GroupedLayer) -> Tensor:
    """The gradient of a grouped linear layer's input."""
    matrices = layer.math.matrix(weight)
    rows = grouped_linear(grad, matrices.mT, None, layer.dispatch.runs)
    return sum_by_token(rows, layer.dispatch) if layer.from_tokens else rows


def _grad_of_weight(grad: Tensor, x: Tensor, weight: Tensor, layer: GroupedLayer) -> Tensor:
    total = torch.empty_like(weight)
    idle = set(range(weight.shape[0]))
    for expert, start, stop in layer.dispatch.runs:
        idle.discard(expert)
        inputs, outputs = layer.inputs(x, start, stop), grad[start:stop]
        if layer.math.transposed:
            torch.mm(inputs.t(), outputs, out=total[expert])
        else:
            torch.mm(outputs.t(), inputs, out=total[expert])
    for expert in idle:
        total[expert].zero_()
    return total


def _grad_of_bias(grad: Tensor, bias: Tensor, layer: GroupedLayer) -> Tensor:
    total = torch.zeros_like(bias)
    for expert, start, stop in layer.dispatch.runs:
        torch.sum(grad[start:stop], dim=0, out=total[expert])
    return total


@final
class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(outputs if ctx.needs_input_grad[1] else None, weights)
        return sum_by_token(outputs, dispatch, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outputs, weights = ctx.saved_tensors
        wants_outputs, wants_weights, _ = ctx.needs_input_grad
        num_rows = ctx.dispatch.num_rows
        grad_outputs = grad.new_empty(num_rows, grad.shape[1]) if wants_outputs else None
        grad_weights = torch.empty_like(weights) if wants_weights else None
        for start in range(0, num_rows, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            rows = grad.index_select(0, ctx.dispatch.rows[block])
            if grad_outputs is not None:
                torch.mul(rows, weights[block, None], out=grad_outputs[block])
            if grad_weights is not None:
                grad_weights[block] = dot_rows(rows, outputs[block])
        return grad_outputs, grad_weights, None


def dot_rows(a: Float[Tensor, "n D"], b: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
    """The inner product of every row of one with the same row of the other, in at least float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(1)
