"""Run experts whose matrices an adapter changes: low-rank terms on the routed rows, or matrices of its own.

No changed matrix is ever built: each expert's rows pass through its two thin factors beside its own matrix.
Where a factor is zero, what the base computes is left as it is to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mixtura.kernels.dispatch import Run, sum_by_token
from mixtura.kernels.experts import ExpertMath
from mixtura.kernels.matmul import kernel_for
from mixtura.kernels.records import ExpertTensors
from mixtura.kernels.training import GroupedLayer, Multiply, grouped_product
from mixtura.methods._precision import full_precision
from mixtura.types import Change, LowRank, Own

# Of each expert that is changed, which of the M entries of a change is its own.
Slots = Mapping[int, int]


class Added(NamedTuple):
    """What is added to one expert's matrix, and for which tokens: ``scale * b @ a``."""

    a: Tensor
    b: Tensor
    scale: float
    tokens: Tensor | None


class _Places(NamedTuple):
    """Which entry is whose, by what each is scaled, and which rows meet it: None for all."""

    slots: Slots
    scales: list[float]
    met: Tensor | None

    def only_met(self, thin: Tensor, start: int, stop: int) -> Tensor:
        """Rows as they are where they meet what is added, and zeros where not."""
        return thin if self.met is None else thin.mul_(self.met[start:stop, None])


def slots_of(change: Change) -> Slots:
    """Which entry of a change belongs to each expert."""
    return {expert: slot for slot, expert in enumerate(change.expert_ids)}


def tensors_of(change: Change) -> tuple[Tensor, ...]:
    """All tensors of a change that may be trained."""
    parts = change.matrices.values()
    return tuple(t for part in parts for t in ((part.weight,) if isinstance(part, Own) else (part.a, part.b)))


def adapted_product(changes: Sequence[Change]) -> Multiply:
    """`grouped_product` with the experts' matrices as adapters change them.

    Of several changes with matrices of their own, the last one's stand; what thin factors add comes on top.
    Those of a change do not see its share ``dropout`` of every row's features.
    """

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, layer: GroupedLayer) -> Tensor:
        own: dict[int, Tensor] = {}
        added: list[tuple[LowRank, Change]] = []
        for change in changes:
            part = change.matrices.get(layer.name)
            if isinstance(part, Own):
                own |= {expert: part.weight[slot] for expert, slot in slots_of(change).items()}
            elif part is not None:
                added.append((part, change))
        if own:
            product = _own_product(x, weight, bias, own, layer)
        else:
            product = grouped_product(x, weight, bias, layer)
        for part, change in added:
            shown, seen = x, layer
            if change.dropout > 0:
                rows = x.index_select(0, layer.dispatch.rows) if layer.from_tokens else x
                shown, seen = F.dropout(rows, change.dropout), layer._replace(from_tokens=False)
            met = None if change.tokens is None else change.tokens.index_select(0, layer.dispatch.rows)
            places = _Places(slots_of(change), part.scale.tolist(), met)
            product = cast(
                Tensor,
                _AddLowRank.apply(product, shown, part.a, part.b, places, seen),  # type: ignore[no-untyped-call]
            )
        return product

    return multiply


def changed_expert(
    tensors: ExpertTensors, expert: int, changes: Sequence[Change]
) -> tuple[ExpertTensors, dict[str, list[Added]]]:
    """One expert's tensors with matrices of an adapter's own put in, and what is added by name of matrix."""
    added: dict[str, list[Added]] = {"up": [], "down": []}
    for change in changes:
        slot = slots_of(change).get(expert)
        if slot is None:
            continue
        for name, part in change.matrices.items():
            if isinstance(part, Own):
                tensors = tensors._replace(**{name: part.weight[slot].to(getattr(tensors, name).dtype)})
            else:
                added[name].append(Added(part.a[slot], part.b[slot], float(part.scale[slot]), change.tokens))
    return tensors, added


def _own_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, own: Mapping[int, Tensor], layer: GroupedLayer
) -> Tensor:
    matrices = [matrix.to(weight.dtype) for matrix in own.values()]
    product = _OwnLinear.apply(x, weight, bias, tuple(own), layer, *matrices)  # type: ignore[no-untyped-call]
    return cast(Tensor, product)


@final
class _OwnLinear(Function):
    """A grouped linear layer in which some experts multiply with matrices of their own.

    The base's matrices and biases get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        experts: tuple[int, ...],
        layer: GroupedLayer,
        *own: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.experts = layer, experts
        ctx.save_for_backward(x, weight, *own)
        rows = x.index_select(0, layer.dispatch.rows) if layer.from_tokens else x
        chosen = _chosen(weight, experts, own, layer.math)
        return _each(rows, chosen, bias, layer.dispatch.runs, weight.shape[1 + layer.math.transposed])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *own = ctx.saved_tensors
        layer, experts, grad = ctx.layer, ctx.experts, grad.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            turned = {e: matrix.mT for e, matrix in _chosen(weight, experts, own, layer.math).items()}
            rows = _each(grad, turned, None, layer.dispatch.runs, x.shape[1])
            grad_x = sum_by_token(rows, layer.dispatch) if layer.from_tokens else rows
        runs = {run.expert: run for run in layer.dispatch.runs}
        grads = [_grad_of_own(grad, x, runs.get(e), m, layer) for e, m in zip(experts, own, strict=True)]
        return grad_x, None, None, None, None, *grads


def _chosen(
    weight: Tensor, experts: Sequence[int], own: Sequence[Tensor], math: ExpertMath
) -> dict[int, Tensor]:
    every = dict(enumerate(weight.unbind())) | dict(zip(experts, own, strict=True))
    return {expert: math.matrix(matrix) for expert, matrix in every.items()}


def _each(
    x: Tensor, matrices: Mapping[int, Tensor], bias: Tensor | None, runs: Sequence[Run], outputs: int
) -> Tensor:
    made = x.new_empty(x.shape[0], outputs)
    for expert, start, stop in runs:
        multiply = kernel_for(matrices[expert])
        added = None if bias is None else bias[expert]
        multiply(made[start:stop], x[start:stop], matrices[expert], added)
    return made


def _grad_of_own(grad: Tensor, x: Tensor, run: Run | None, own: Tensor, layer: GroupedLayer) -> Tensor:
    if run is None:
        return torch.zeros_like(own)
    inputs, outputs = layer.inputs(x, run.start, run.stop), grad[run.start : run.stop]
    total = torch.empty_like(own)
    first, second = (inputs, outputs) if layer.math.transposed else (outputs, inputs)
    torch.mm(first.t(), second, out=total)
    return total


@final
class _AddLowRank(Function):
    """Adds to every row its expert's ``scale * (x @ a.T) @ b.T``, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        places: _Places,
        layer: GroupedLayer,
    ) -> Tensor:
        ctx.layer, ctx.places, ctx.x_dtype = layer, places, x.dtype
        thin = a.new_zeros(layer.dispatch.num_rows, a.shape[1])
        with full_precision():
            for slot, start, stop in _runs(layer, places.slots):
                narrow = thin[start:stop]
                torch.mm(layer.inputs(x, start, stop).to(a.dtype), a[slot].t(), out=narrow)
                added = (places.only_met(narrow, start, stop) * places.scales[slot]) @ b[slot].t()
                product[start:stop] += added.to(product.dtype)
        ctx.mark_dirty(product)
        ctx.save_for_backward(x, a, b, thin)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, thin = ctx.saved_tensors
        layer = ctx.layer
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        grad_x = a.new_zeros(layer.dispatch.num_rows, a.shape[2]) if ctx.needs_input_grad[1] else None
        with full_precision():
            for slot, start, stop in _runs(layer, ctx.places.slots):
                wide = grad[start:stop].to(b.dtype) * ctx.places.scales[slot]
                torch.mm(wide.t(), thin[start:stop], out=grad_b[slot])
                narrow = ctx.places.only_met(wide @ b[slot], start, stop)
                torch.mm(narrow.t(), layer.inputs(x, start, stop).to(a.dtype), out=grad_a[slot])
                if grad_x is not None:
                    torch.mm(narrow, a[slot], out=grad_x[start:stop])
        if grad_x is not None:
            grad_x = sum_by_token(grad_x, layer.dispatch) if layer.from_tokens else grad_x
            grad_x = grad_x.to(ctx.x_dtype)
        return grad, grad_x, grad_a, grad_b, None, None


def _runs(layer: GroupedLayer, slots: Slots) -> list[Run]:
    """The runs of experts that are changed, by the entry that is theirs."""
    known = [(slots.get(run.expert), run) for run in layer.dispatch.runs]
    return [Run(slot, run.start, run.stop) for slot, run in known if slot is not None]
