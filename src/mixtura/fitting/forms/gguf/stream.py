"""A model in llama.cpp's types as transformers computes it: decoded values in place of the source's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mixtura.checkpoints.gguf.tensors import FileTensor
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.records import ExpertWeights
from mixtura.fitting.forms.gguf.units import Unit
from mixtura.kernels import ExpertTensors
from mixtura.running.stream import Streamed

# Asked by a tensor and the number of its piece.
Decoded = Callable[[FileTensor, int], Tensor]


def changed_stream(
    view: CheckpointView,
    rounded: Iterable[tuple[Unit, tuple[FileTensor, ...]]],
    decoded: Decoded,
    dtype: torch.dtype,
) -> Streamed:
    """The model with some tensors as their types have them.

    Args:
        view: the source.
        rounded: units, with their tensors in the types they are to have.
        decoded: gives a piece of such a tensor as numbers, in the file's layout.
        dtype: to compute in.
    """
    experts: dict[str, dict[str, FileTensor]] = {}
    dense: dict[str, list[FileTensor]] = {}
    for unit, tensors in rounded:
        for tensor in tensors:
            first = tensor.pieces[0]
            if first.expert is not None:
                experts.setdefault(first.parameter, {})[first.expert[1]] = tensor
            elif unit.stored is not None:
                dense.setdefault(unit.stored, []).append(tensor)
    layers = {layer.index: layer for layer in view.layers}

    def instead(index: int, expert: int, wanted: torch.dtype) -> ExpertTensors | None:
        layer = layers[index]
        parts = experts.get(layer.name)
        if parts is None:
            return None
        # Those of the source are widened first, for what is decoded is in float32.
        weights = ExpertWeights.from_native(layer.native_expert(expert).to(torch.float32), layer.layout)
        values = {part: decoded(tensor, expert) for part, tensor in parts.items()}
        return replace(weights, **values).to_native(layer.layout).to(wanted)

    def changed(name: str, value: Tensor) -> Tensor:
        if name not in dense:
            return value
        whole = value.to(torch.float32).clone()
        for tensor in dense[name]:
            place = tensor.pieces[0].place
            assert place is not None
            place(whole, decoded(tensor, 0))
        return whole

    return Streamed(view, instead, changed=changed, dtype=dtype)
