"""Neurons of experts taken out of a checkpoint: rows of first matrices and columns of last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from mixtura.checkpoints.applying.copying import Watch, read_range
from mixtura.checkpoints.applying.shards import OutputTensor, Sink, Unit
from mixtura.checkpoints.viewing.base import LayerView, ModelView
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.headers import TensorEntry
from mixtura.checkpoints.viewing.probe import CountField, width_field
from mixtura.errors import UnsupportedModelError, UserError, counted_names
from mixtura.types import Plan, Trim

_INSTEAD = "drop whole experts (--prune) or store them in fewer bits (--quantize) instead"


@final
@dataclass(frozen=True, eq=False)
class CutNeurons(Unit):
    """Copies some rows or columns of one matrix of an expert, with the matrix in memory."""

    output: OutputTensor
    entry: TensorEntry
    axis: int
    kept: tuple[int, ...]
    watch: Watch

    @staticmethod
    def of(entry: TensorEntry, axis: int, kept: tuple[int, ...], watch: Watch) -> CutNeurons:
        """The unit that copies those under the same name."""
        shape = tuple(len(kept) if place == axis else size for place, size in enumerate(entry.shape))
        return CutNeurons(OutputTensor(entry.name, entry.dtype, shape), entry, axis, kept, watch)

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Copy them."""
        whole = read_range(self.entry, 0, self.entry.num_bytes).view(self.entry.dtype).view(self.entry.shape)
        cut = whole.index_select(self.axis, torch.tensor(self.kept))
        self.watch.check(self.entry, cut, self.watch.experts[0])
        sink.write(self.output.name, cut)


@final
@dataclass(frozen=True, slots=True)
class NewWidth:
    """The width that experts have after neurons were taken out, and where the config says it."""

    field: CountField
    d_expert: int


def check_trims(view: ModelView, plan: Plan) -> None:
    """Refuse trims that leave experts of several widths, or go with other actions.

    Raises:
        UserError: says which and what to do.
    """
    trimmed = plan.trimmed()
    if not trimmed:
        return
    others = sorted({action.kind for action in plan.actions if not isinstance(action, Trim)})
    if others:
        raise UserError(
            f"the plan takes neurons out and does something else besides ({', '.join(others)}); apply the "
            f"trims alone, and another plan to the result"
        )
    widths = set()
    for layer in view.layers:
        for expert in range(layer.num_experts):
            gone = trimmed.get((layer.index, expert), ())
            if len(set(gone)) < len(gone) or not all(0 <= one < layer.shape.d_expert for one in gone):
                raise UserError(
                    f"the plan takes neurons out of expert {expert} of layer {layer.index} twice or that are "
                    f"not there: it has 0 to {layer.shape.d_expert - 1}"
                )
            widths.add(layer.shape.d_expert - len(gone))
    if len(widths) > 1 or 0 in widths:
        raise UserError(
            f"the plan leaves experts of {', '.join(map(str, sorted(widths)))} neurons, and a config has one "
            f"width for all, above 0; take as many out of each"
        )


def new_width(view: DiskView, plan: Plan) -> NewWidth | None:
    """The width after a plan's trims; None where it has none.

    Raises:
        UnsupportedModelError: this family's experts cannot be made narrower alone.
    """
    trimmed = plan.trimmed()
    if not trimmed:
        return None
    return NewWidth(trimmed_field(view), view.layers[0].shape.d_expert - len(next(iter(trimmed.values()))))


def trimmed_field(view: DiskView) -> CountField:
    """The field of the config that is the width of all routed experts and of nothing else.

    Raises:
        UnsupportedModelError: there is none, or experts lie in a form that neurons are not taken out of.
    """
    for layer in view.layers:
        _check_layer(view, layer)
    widths = {layer.shape.d_expert for layer in view.layers}
    parameters = {name for layer in view.layers for name in layer.expert_parameters}
    field = None
    if len(widths) == 1:
        field = width_field(view.meta_model, view.config, widths.pop(), parameters)
    if field is None:
        raise UnsupportedModelError(
            f"no one field of a {view.model_type} config is the width of its routed experts and of nothing "
            f"else (shared experts often have the same), so they cannot be made narrower alone; {_INSTEAD}"
        )
    return field


def _check_layer(view: DiskView, layer: DiskLayer) -> None:
    """Refuse experts that are not plain matrices, each with a name of its own."""
    if layer.layout.transposed or layer.layout.has_bias or layer.layout.has_post_norm:
        raise UnsupportedModelError(
            f"experts of {view.model_type} lie transposed or have biases or norms behind them, of which "
            f"neurons are not taken out; {_INSTEAD}"
        )
    if layer.fused_tensor_names():
        raise UnsupportedModelError(
            f"checkpoints of {view.model_type} keep all experts of a layer in one tensor, of which "
            f"neurons are not taken out; {_INSTEAD}"
        )
    for name in layer.expert_tensor_names(0):
        stored = view.stored.get(name)
        if stored is None or len(stored.parts) > 1 or not view.entries[name].dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{name} is stored in fewer bits with scales, and neurons share these; start from the model "
                f"in bfloat16"
            )
    beside = tuple(view.beside_experts(layer)) + view.layers_beyond
    if beside:
        raise UnsupportedModelError(
            f"the checkpoint has tensors of experts that transformers does not load "
            f"({counted_names(beside)}) and that would keep the old width; {_INSTEAD}"
        )


def trim_units(view: DiskView, plan: Plan) -> dict[str, Sequence[Unit]]:
    """What is written in the place of experts' matrices."""
    units: dict[str, Sequence[Unit]] = {}
    for (index, expert), gone in plan.trimmed().items():
        layer = next(one for one in view.layers if one.index == index)
        width = layer.shape.d_expert
        kept = tuple(neuron for neuron in range(width) if neuron not in set(gone))
        watch = Watch(index, "expert", (expert,))
        for parameter, axis in zip(layer.expert_parameters, (0, 1), strict=True):
            source = view.sources[parameter]
            for pattern, names in source.own_parts(parameter).items():
                del pattern
                entry = view.entries[names[expert]]
                units[entry.name] = (CutNeurons.of(entry, axis, _places(layer, entry, axis, kept), watch),)
    return units


def _places(layer: LayerView, entry: TensorEntry, axis: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Where neurons lie along an axis: once, or gate first and up after."""
    width = layer.shape.d_expert
    times, rest = divmod(entry.shape[axis], width)
    if rest or (times > 1 and layer.layout.interleaved):
        raise UnsupportedModelError(
            f"{entry.name} has {entry.shape[axis]} rows for {width} neurons; {_INSTEAD}"
        )
    return tuple(piece * width + neuron for piece in range(times) for neuron in kept)
