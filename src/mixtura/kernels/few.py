"""Experts by the compiled kernels: all of a layer's experts in one call, read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.kernels.activations import Activation
from mixtura.kernels.compiled import NUMBERS, is_plain, native, options, rows_of, way_for, with_rows
from mixtura.kernels.crossing import ALWAYS_FEW, few_rows_of
from mixtura.kernels.experts import ExpertMath, StackedExperts
from mixtura.kernels.matrices import Matrix, dense_matrix


class ExpertMatrices(NamedTuple):
    """One expert for the compiled kernels; biases are in float32 or bfloat16, both or none."""

    up: Matrix
    down: Matrix
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@final
class NativeLayer:
    """The experts of a layer for the compiled kernels; holds what they must not lose."""

    def __init__(self, up: Matrix, down: Matrix, slowest: Matrix, record: Any, holds: object) -> None:
        self.features = up.rows
        self.d_model = up.cols
        self.d_expert = down.cols
        self.outputs = down.rows
        self.slowest = slowest
        self.record = record
        self.holds = holds

    @staticmethod
    def of(experts: Sequence[ExpertMatrices]) -> NativeLayer | None:
        """A layer of experts that may each be stored in its own way; None where the kernels cannot."""
        extension = native()
        if extension is None or not experts:
            return None
        record = extension.Layer()
        first = experts[0]
        for expert in experts:
            biases = [bias for bias in (expert.up_bias, expert.down_bias) if bias is not None]
            if any(bias.dtype != biases[0].dtype or not bias.is_contiguous() for bias in biases):
                return None
            if any(bias.dtype not in NUMBERS for bias in biases):
                return None
            number = NUMBERS[biases[0].dtype] if biases else 0
            record.add(
                expert.up.record,
                expert.down.record,
                _address(expert.up_bias),
                _address(expert.down_bias),
                number,
            )
        matrices = (matrix for expert in experts for matrix in (expert.up, expert.down))
        slowest = min(matrices, key=lambda matrix: (not matrix.is_trellis, matrix.bits))
        return NativeLayer(first.up, first.down, slowest, record, tuple(experts))


def stacked_layer(store: StackedExperts, math: ExpertMath) -> NativeLayer | None:
    """The layer of plain tensors, in place; None where the kernels cannot read them."""
    tensors = store.tensors()
    if not is_plain(*tensors) or any(tensor.dtype != store.up.dtype for tensor in tensors):
        return None
    up, down = dense_matrix(math.matrix(store.up)[0]), dense_matrix(math.matrix(store.down)[0])
    biases = (store.up_bias, store.down_bias)
    if up is None or down is None or any(b is not None and b.stride(-1) != 1 for b in biases):
        return None
    extension = native()
    assert extension is not None
    record = extension.Layer()
    strides = [0 if t is None else t.stride(0) * t.element_size() for t in (store.up, store.down, *biases)]
    record.add_all(
        store.num_experts,
        up.record,
        strides[0],
        down.record,
        strides[1],
        _address(store.up_bias),
        strides[2],
        _address(store.down_bias),
        strides[3],
        NUMBERS[store.up.dtype],
    )
    return NativeLayer(up, down, up, record, tensors)


def run_few(
    x: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "..."],
    weights: Float[Tensor, "..."],
    store: object,
    math: ExpertMath,
    token_ids: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, "T D"] | None:
    """Run experts by the compiled kernels where they can and where that is the faster; else None.

    Args:
        x: tokens.
        expert_ids: expert of each assignment; one that does not exist is absent.
        weights: of each assignment.
        store: `StackedExperts`, or one with a method ``native_layer`` that gives its `NativeLayer`.
        math: what the experts compute around their matrices.
        token_ids: token of each assignment; by default each token has as many, in order.
    """
    if options().mode == "torch" or native() is None or not x.shape[0] or not expert_ids.numel():
        return None
    if not is_plain(x) or weights.device != x.device or expert_ids.device != x.device:
        return None
    layer = layer_of(store, math)
    if layer is None or layer.d_model != x.shape[1]:
        return None
    num_experts = getattr(store, "num_experts")  # noqa: B009
    rows = -(-expert_ids.numel() // min(num_experts, expert_ids.numel()))
    if options().mode == "fast" and rows > ALWAYS_FEW and rows > few_rows_of(layer.slowest, x.dtype):
        return None
    return _Call(x, expert_ids, weights, token_ids).run(layer, math)


def layer_of(store: object, math: ExpertMath) -> NativeLayer | None:
    """The layer of a store of any kind; None where the kernels cannot read it."""
    if isinstance(store, StackedExperts):
        return stacked_layer(store, math)
    find = getattr(store, "native_layer", None)
    return None if find is None else find()


@final
class _Call:
    """The tensors of one call in the form the kernels take, held while it runs."""

    def __init__(self, x: Tensor, expert_ids: Tensor, weights: Tensor, token_ids: Tensor | None) -> None:
        extension = native()
        assert extension is not None
        self._native = extension
        self._x = with_rows(x)
        self._way = way_for(x.dtype)
        self._ids = expert_ids.reshape(-1).long().contiguous()
        weights = weights.reshape(-1)
        self._weights = (weights if weights.dtype in NUMBERS else weights.float()).contiguous()
        self._token_ids = None if token_ids is None else token_ids.long().contiguous()
        num = self._ids.numel()
        self._assigned = extension.Assignments(
            self._ids.data_ptr(), _address(self._token_ids), -(-num // x.shape[0]), num, x.shape[0]
        )

    def run(self, layer: NativeLayer, math: ExpertMath) -> Tensor:
        x, known = self._x, math.known
        if math.post is None and known is not None and self._fits(known, layer):
            out = x.new_empty(x.shape[0], layer.outputs)
            self._native.run_experts(
                self._way,
                layer.record,
                self._assigned,
                rows_of(x),
                rows_of(self._weights),
                known.record(),
                rows_of(out),
            )
            return out
        made = x.new_empty(self._ids.numel(), layer.features)
        self._native.run_up(self._way, layer.record, self._assigned, rows_of(x), rows_of(made))
        hidden = with_rows(math.activation(made).to(x.dtype))
        if math.post is None:
            return self._down(layer, hidden, x.new_empty(x.shape[0], layer.outputs), self._weights)
        rows = self._down(layer, hidden, x.new_empty(self._ids.numel(), layer.outputs), None)
        return self._sum(math.post(rows), layer)

    def _fits(self, known: Activation, layer: NativeLayer) -> bool:
        return layer.features == layer.d_expert * (2 if known.gated else 1)

    def _down(self, layer: NativeLayer, hidden: Tensor, out: Tensor, weights: Tensor | None) -> Tensor:
        self._native.run_down(
            self._way, layer.record, self._assigned, rows_of(hidden), rows_of(weights), rows_of(out)
        )
        return out

    def _sum(self, rows: Tensor, layer: NativeLayer) -> Tensor:
        """Every token's weighted sum of its rows that are present."""
        there = (self._ids >= 0) & (self._ids < layer_size(layer))
        ids = self._token_ids
        if ids is None:
            ids = torch.arange(self._ids.numel()) // (self._ids.numel() // self._x.shape[0])
        weighted = rows[there].float() * self._weights[there, None].float()
        total = torch.zeros(self._x.shape[0], rows.shape[1])
        return total.index_add_(0, ids[there], weighted).to(self._x.dtype)


def layer_size(layer: NativeLayer) -> int:
    """Number of experts of a layer."""
    return int(layer.record.num_experts)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
