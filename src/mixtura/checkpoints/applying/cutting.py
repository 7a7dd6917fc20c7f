"""Which entries of a stored tensor stay when experts go: router rows, biases, scales.

Most are stored as the model has them and lose entries of one axis. A few are transposed, or hold two
layers' entries after each other; what is kept of them is found by sending the numbers of their
entries through transformers' own conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.checkpoints.applying.copying import CopyRows, GatherEntries, Watch
from mixtura.checkpoints.applying.shards import Unit
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.mapping import ShapeModel, Source
from mixtura.errors import UnsupportedModelError


def router_units(view: DiskView, kept: Mapping[int, tuple[int, ...]]) -> dict[str, Sequence[Unit]]:
    """By name on disk, the units that copy the tensors of routers without dropped experts' entries.

    Args:
        view: the source.
        kept: the experts each layer keeps, by the layer's number.

    Raises:
        UnsupportedModelError: a tensor with one entry per expert is stored in a way that cannot be cut.
    """
    entries = {name: selection for layer in view.layers for name, selection in _entries(layer, kept)}
    units: dict[str, Sequence[Unit]] = {}
    for layer in view.layers:
        inside = [name for name in view.sources if name.startswith(f"{layer.router_name}.")]
        for parameter in dict.fromkeys((*inside, *layer.per_expert_tensors())):
            if parameter not in view.sources:
                continue
            watch = Watch(layer.index, "router", finite=parameter == layer.site.router_weight)
            source = view.sources[parameter]
            loses = any(target in entries for target in source.targets)
            for stored in source.names:
                for part in view.stored[stored].parts:
                    units[part] = (CopyRows.of(view.entries[part], watch=watch),)
                if loses:
                    units[stored] = (_cut(view, layer, parameter, stored, entries, watch),)
    return units


def _entries(
    layer: DiskLayer, kept: Mapping[int, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """For a layer that loses experts, by parameter: the axis and the experts that stay."""
    if len(kept[layer.index]) < layer.num_experts:
        for name, axis in layer.per_expert_tensors().items():
            yield name, (axis, kept[layer.index])


def _cut(
    view: DiskView,
    layer: DiskLayer,
    parameter: str,
    stored: str,
    entries: Mapping[str, tuple[int, tuple[int, ...]]],
    watch: Watch,
) -> Unit:
    """The unit that copies what stays of one stored tensor."""
    source, tensor = view.sources[parameter], view.stored[stored]
    if len(tensor.parts) == 1 and source.converter is None:
        axis, kept = entries[parameter]
        rows = _with_rest(kept, layer.num_experts, tensor.shape[axis])
        if axis == 0:
            return CopyRows.of(view.entries[stored], rows=rows, watch=watch)
        numbers = _numbers(tensor.shape).index_select(axis, torch.tensor(rows))
        return GatherEntries.of(view.entries[stored], numbers, watch)
    if len(tensor.parts) == 1 and source.names == (stored,):
        found = _converted_numbers(source, tensor.shape, entries, layer.num_experts, view.config)
        if found is not None:
            return GatherEntries.of(view.entries[stored], found, watch)
    raise UnsupportedModelError(
        f"{stored} has one entry per expert but is stored in a way ({tensor.kind}) that cannot be cut, so "
        f"no experts of layer {layer.index} can be dropped; quantize them instead"
    )


def _converted_numbers(
    source: Source,
    shape: tuple[int, ...],
    entries: Mapping[str, tuple[int, tuple[int, ...]]],
    num_experts: int,
    config: object,
) -> Int[Tensor, "..."] | None:
    """Which entries of a converted tensor stay, in its new shape; None where no shape gives them.

    A shape is right if the tensor cut to it is converted to just the parameters wanted.
    """
    (pattern,) = source.parts
    numbers: Tensor = _numbers(shape)

    def converted(values: Tensor) -> dict[str, Tensor]:
        like = ShapeModel(lambda _: tuple(values.shape))
        return source.convert({pattern: [values]}, like, config)

    wanted = {}
    for name, values in converted(numbers).items():
        axis, kept = entries.get(name, (0, ()))
        rows = _with_rest(kept, num_experts, values.shape[axis]) if name in entries else None
        wanted[name] = values if rows is None else values.index_select(axis, torch.tensor(rows))
    stays: Tensor = torch.cat([values.flatten() for values in wanted.values()]).sort().values
    for axis, length in enumerate(shape):
        smaller = list(shape)
        smaller[axis], rest = divmod(length * len(stays), numbers.numel())
        if rest == 0:
            cut = stays.reshape(smaller)
            made = converted(cut)
            if all(torch.equal(made[name], values) for name, values in wanted.items()):
                return cut
    return None


def _with_rest(kept: tuple[int, ...], num_experts: int, length: int) -> tuple[int, ...]:
    """The entries that stay of `length`: those after the last expert's belong to none and stay."""
    return (*kept, *range(num_experts, length))


def _numbers(shape: tuple[int, ...]) -> Int[Tensor, "..."]:
    """A tensor that holds the place of each of its entries."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)
