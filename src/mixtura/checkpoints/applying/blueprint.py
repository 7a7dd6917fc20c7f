"""From a plan and a view of the source to every tensor of the new checkpoint and what writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from mixtura.checkpoints.applying.checking import check_plan
from mixtura.checkpoints.applying.copying import CopyRows, Watch
from mixtura.checkpoints.applying.cutting import router_units
from mixtura.checkpoints.applying.matrices import matrix_units
from mixtura.checkpoints.applying.packing import packed_units
from mixtura.checkpoints.applying.shards import Unit
from mixtura.checkpoints.applying.trimming import NewWidth, new_width, trim_units
from mixtura.checkpoints.contents import Contents
from mixtura.checkpoints.packed import LayerRecord
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.edits import renumbered
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.types import Merge, Plan, Quantize


@final
@dataclass(frozen=True, slots=True)
class Blueprint:
    """All of a new checkpoint before its first byte is written.

    Attributes:
        units: what writes its tensors, in order.
        contents: what it holds of each MoE layer, and its matrices in fewer bits.
        ordinary: whether it is an ordinary checkpoint of its family, not of the mixtura format.
        left_out: the beginnings of names of layers that the model has not and that do not go along.
        width: of the experts, where neurons were taken out of them.
    """

    units: tuple[Unit, ...]
    contents: Contents
    ordinary: bool
    left_out: tuple[str, ...] = ()
    width: NewWidth | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, exactly what will be on the disk less the files' headers."""
        return sum(unit.num_bytes for unit in self.units)


def blueprint(view: DiskView, plan: Plan, rounded: RoundedExperts | None = None) -> Blueprint:
    """Every tensor that applying `plan` to a checkpoint makes.

    Reads one expert of each layer that is quantized, to learn what it takes; nothing else.

    Raises:
        UserError: the plan does not fit the model.
    """
    kept = check_plan(view, plan)
    actions = _actions_by_layer(view, plan, kept)
    order = sorted(view.entries, key=lambda name: (view.entries[name].file, view.entries[name].offset))
    rank = {name: place for place, name in enumerate(order)}
    # What is written in place of a stored tensor; what is not named here is copied as it is.
    changed = router_units(view, kept)
    packed, matrices = matrix_units(view, plan)
    changed.update(packed)
    layers = []
    for layer in view.layers:
        own, experts, shared = kept[layer.index], None, None
        if layer.index in actions:
            merges = plan.merged().get(layer.index, ())
            made = packed_units(view, layer, own, actions[layer.index], rounded, merges)
            shared = _shared(own, merges)
            records = {unit.number: unit.record for unit in made}
            experts = tuple(records[place] for place in shared or range(len(own)))
            names = sorted(_expert_names(layer), key=rank.__getitem__)
            changed.update({**dict.fromkeys((*names, *view.beside_experts(layer)), ()), names[0]: made})
        else:
            changed.update({**_own_units(view, layer, own), **_fused_units(view, layer, own)})
        layers.append(LayerRecord(layer.index, layer.name, own, experts, shared))
    width = new_width(view, plan)
    changed.update(trim_units(view, plan))
    even = is_even(view, kept)
    fewer = any(len(kept[layer.index]) < layer.num_experts for layer in view.layers)
    # With one number in the config for all layers, those that nothing is known of cannot keep the old one.
    left_out = view.layers_beyond if even and fewer else ()
    changed.update({name: () for name in view.unused_names if name.startswith(left_out)})
    units = [
        unit
        for name in order
        for unit in (changed[name] if name in changed else (CopyRows.of(view.entries[name]),))
    ]
    ordinary = not actions and not matrices and even
    return Blueprint(tuple(units), Contents(tuple(layers), matrices), ordinary, left_out, width)


def _shared(kept: tuple[int, ...], merges: Sequence[Merge]) -> tuple[int, ...] | None:
    """For each expert that is kept, by its new number, the one whose tensors it has; None without merges."""
    if not merges:
        return None
    first = {expert: merge.experts[0] for merge in merges for expert in merge.experts}
    return tuple(kept.index(first.get(expert, expert)) for expert in kept)


def is_even(view: DiskView, kept: Mapping[int, tuple[int, ...]]) -> bool:
    """Whether the config can say how many experts each layer has: one number for each of its fields."""
    counts: dict[tuple[str, ...], set[int]] = {}
    for layer in view.layers:
        counts.setdefault(view.count_fields[layer.stack].path, set()).add(len(kept[layer.index]))
    return all(len(found) == 1 for found in counts.values())


def _actions_by_layer(
    view: DiskView, plan: Plan, kept: Mapping[int, tuple[int, ...]]
) -> dict[int, dict[int, Quantize]]:
    """How the experts of each layer that is packed are quantized, by expert; merged ones are packed, too.

    Layers whose experts share one list of names on disk (text and images) are packed together.

    Raises:
        UserError: such layers would keep different numbers of experts, or layers that are one and the
            same on disk (an encoder tied to a decoder) different experts.
        UnsupportedModelError: layers that are the same on disk would be quantized.
    """
    actions: dict[int, dict[int, Quantize]] = {}
    for (index, expert), action in plan.quantized().items():
        actions.setdefault(index, {})[expert] = action
    for index in plan.merged():
        actions.setdefault(index, {})
    sharing: dict[tuple[str, ...], list[int]] = {}
    tied = set()
    for layer in view.layers:
        source = view.sources[layer.expert_parameters[0]]
        together = sharing.setdefault(source.names, [])
        together.append(layer.index)
        if len(together) > 1 and len(source.targets) == 1:
            tied.add(source.names)
    for names, together in sharing.items():
        listed = " and ".join(map(str, together))
        if names in tied and len({kept[index] for index in together}) > 1:
            raise UserError(
                f"layers {listed} share their experts, so the same must be dropped in each of them"
            )
        if len({len(kept[index]) for index in together}) > 1:
            raise UserError(
                f"layers {listed} store their experts in one list, so as many must be dropped in each of them"
            )
        if any(index in actions for index in together):
            if names in tied:
                raise UnsupportedModelError(
                    f"layers {listed} share their experts, which are then neither merged nor quantized; drop "
                    f"some instead"
                )
            for index in together:
                actions.setdefault(index, {})
    return actions


def _expert_names(layer: DiskLayer) -> set[str]:
    """Every name on disk that holds experts of the layer."""
    own = (name for expert in range(layer.num_experts) for name in layer.expert_tensor_names(expert))
    return {*own, *layer.fused_tensor_names()}


def _own_units(view: DiskView, layer: DiskLayer, kept: tuple[int, ...]) -> dict[str, Sequence[Unit]]:
    """Copies of tensors of single experts, under their new numbers."""
    units: dict[str, Sequence[Unit]] = {}
    for expert in range(layer.num_experts):
        for name in layer.expert_tensor_names(expert):
            units[name] = ()
            if expert in kept:
                number = renumbered(name, layer.num_experts, kept)
                watch = Watch(layer.index, "expert", (expert,), exponents=_is_exponents(view, name))
                units[name] = (CopyRows.of(view.entries[name], name=number, watch=watch),)
    for name, expert in view.beside_experts(layer).items():
        units[name] = ()
        if expert in kept:
            number = renumbered(name, layer.num_experts, kept)
            units[name] = (CopyRows.of(view.entries[name], name=number),)
    return units


def _fused_units(view: DiskView, layer: DiskLayer, kept: tuple[int, ...]) -> dict[str, Sequence[Unit]]:
    """Copies of the rows that experts have in tensors of all experts."""
    units: dict[str, Sequence[Unit]] = {}
    for name in layer.fused_tensor_names():
        entry = view.entries[name]
        if not entry.shape or entry.shape[0] != layer.num_experts:
            # One scale for all experts: no expert's own.
            units[name] = (CopyRows.of(entry, watch=Watch(layer.index, "expert")),)
            continue
        rows = None if len(kept) == layer.num_experts else kept
        watch = Watch(layer.index, "expert", kept, exponents=_is_exponents(view, name))
        units[name] = (CopyRows.of(entry, rows=rows, watch=watch),)
    return units


def _is_exponents(view: DiskView, name: str) -> bool:
    """Whether a tensor of bytes holds the scales of a scaled format: exponents of two."""
    return view.entries[name].dtype == torch.uint8 and name not in view.stored and "scale" in name
