"""What is kept of a layer's experts that a checkpoint stores in fewer bits."""

from __future__ import annotations

from typing import cast

from mixtura.checkpoints.applying.packing import PackExpert, expert_tensors, packed_units
from mixtura.checkpoints.packed import STORED_KINDS, LayerRecord
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.stores import Form, PackedStore
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.packed import PackedLayer


def packed_forms(
    view: CheckpointView, layer: DiskLayer | PackedLayer
) -> tuple[LayerRecord, tuple[Form, ...]] | None:
    """What `mixtura.load` keeps of a layer's experts in fewer bits; None for plain numbers."""
    if isinstance(layer, PackedLayer):
        entries = (view.entries[n] for e in layer.record.stored for n in layer.expert_tensor_names(e))
        return layer.record, tuple(Form(entry.name, entry.dtype, entry.shape) for entry in entries)
    units = scaled_units(view, layer)
    if not units:
        return None
    forms = (Form(out.name, out.dtype, out.shape) for unit in units for out in unit.outputs)
    experts = tuple(unit.record for unit in units)
    record = LayerRecord(layer.index, layer.name, tuple(range(layer.num_experts)), experts)
    return record, tuple(forms)


def packed_store(view: CheckpointView, layer: DiskLayer | PackedLayer) -> PackedStore | None:
    """A layer's experts in the bits they are stored in; None for experts stored as plain numbers."""
    described = packed_forms(view, layer)
    if described is None:
        return None
    record, forms = described
    store = PackedStore(record, forms, transposed=layer.layout.transposed)
    if isinstance(layer, PackedLayer):
        for form in forms:
            store.fill({form.name: view.tensor(form.name)})
    else:
        for unit in scaled_units(view, layer):
            store.fill(expert_tensors(unit.layer, unit.expert, unit.number, unit.storage)[1])
    return store


def scaled_units(view: CheckpointView, layer: DiskLayer) -> list[PackExpert]:
    """The experts of a layer as its source's FP8 or MXFP4; none where they are plain numbers."""
    stored = {view.stored[name].kind for p in layer.expert_parameters for name in view.sources[p].names}
    if not stored <= set(STORED_KINDS) and not stored & set(STORED_KINDS):
        return []
    units = packed_units(cast(DiskView, view), layer, tuple(range(layer.num_experts)), {})
    return units if units and "stored" in units[0].record.up.meta else []
