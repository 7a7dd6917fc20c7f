"""A checkpoint's transformers model with everything but its weights, and the places they go to.

Parameters and stored buffers are on the meta device, in the dtype they will have; what no checkpoint
stores (rotary frequencies and such) is computed. `mixtura.load` fills a skeleton once and for all,
`mixtura.running.stream` one decoder layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.matrices import forms_in, pack_skeleton, part_of
from mixtura.checkpoints.nesting import Widths, check_named
from mixtura.checkpoints.packed import is_packed
from mixtura.checkpoints.slots import Slot, slots
from mixtura.checkpoints.viewing.base import LayerView
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.checkpoints.viewing.meta import build_meta
from mixtura.checkpoints.viewing.packed import PackedView
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.checkpoints.viewing.wrappers import experts_modules
from mixtura.errors import UnsupportedModelError
from mixtura.kernels import register_backend

BACKEND = "mixtura"
# transformers initialises whatever does not carry this mark.
_INITIALIZED = "_is_hf_initialized"

CheckpointView = DiskView | PackedView
# What can be built and streamed: a model without experts as well.
AnyView = CheckpointView | DenseView


def open_checkpoint(path: str | Path, *, bits: Widths | None = None) -> CheckpointView:
    """View a checkpoint directory of either kind: an ordinary one or one of the mixtura format.

    Args:
        path: the directory.
        bits: at how many bits experts are read that the quantizer ``nested`` wrote: for all of them, or by
            decoder layer and expert, the others whole. What narrower ones do not need is never read.

    Raises:
        CheckpointError: the directory is missing, incomplete or damaged.
        UnsupportedModelError: it is a model that mixtura cannot work on.
        UserError: ``bits`` asks for what the experts do not hold.
    """
    if is_packed(Path(path)):
        return PackedView(path, bits=bits)
    check_named((), bits)
    return DiskView(path)


def build(view: AnyView, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode, its experts on mixtura's backend, without weights.

    MoE layers have as many experts as the checkpoint stores, which may differ from layer to layer.

    Args:
        view: the checkpoint.
        dtype: of the parameters that transformers does not keep in another one; by default the one
            that the config names.

    Raises:
        UnsupportedModelError: transformers' class cannot compute logits.
    """
    register_backend()
    config = copy.deepcopy(view.config)
    chosen = dtype or compute_dtype(config)
    model = _on_meta(type(view.meta_model), config, chosen)
    donors: dict[tuple[tuple[str, ...], int], PreTrainedModel] = {}
    for layer in view.layers:
        field, count = view.count_fields[layer.stack], layer.num_experts
        if field.read(config) != count:
            key = (field.path, count)
            if key not in donors:
                changed = copy.deepcopy(view.config)
                field.write(changed, count)
                donors[key] = _on_meta(type(view.meta_model), changed, chosen)
            model.set_submodule(layer.site.block_name, donors[key].get_submodule(layer.site.block_name))
    _untie(model, view)
    if view.matrices:
        pack_skeleton(model, view, view.matrices, forms_in(view))
    compute_buffers(model)
    return model.eval()


def empty_experts(model: PreTrainedModel, layer: LayerView) -> Any:
    """Take the parameters out of an experts module that will run from a store; returns the module.

    Their shapes stay visible as attributes on the meta device.
    """
    experts = model.get_submodule(layer.name)
    for name in layer.layout.parameters:
        held = experts._parameters.pop(name)
        assert held is not None
        experts.__dict__[name] = held.detach().to("meta")
    return experts


def read_slot(slot: Slot, view: AnyView) -> Tensor | None:
    """The stored value of a slot; None where the checkpoint has none, which its family allows."""
    name = next((name for name in slot.names if name in view.sources), None)
    if name is not None:
        return view.parameter(name)
    part = part_of(slot, view)
    return None if part is None else view.tensor(part)


def compute_buffers(model: PreTrainedModel, missing: Collection[Slot] = ()) -> None:
    """Compute what no checkpoint stores, and initialise parameters that this one lacks.

    transformers does the same when it loads a model.
    """
    for module in model.modules():
        for attribute in module._non_persistent_buffers_set & module._buffers.keys():
            held = module._buffers[attribute]
            if held is not None and held.device.type == "meta":
                module._buffers[attribute] = torch.empty_like(held, device="cpu")
    for slot in missing:
        slot.fill(torch.empty_like(slot.empty, device="cpu"))
    fresh = {name for slot in missing for name in slot.names}
    for name, tensor in (*model.named_parameters(), *_persistent_buffers(model)):
        if name not in fresh:
            setattr(tensor, _INITIALIZED, True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.initialize_weights()


def _on_meta(cls: type[nn.Module], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            part.dtype = dtype
    with _default_dtype(dtype):
        model = build_meta(cls, config)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{cls.__name__} is not a model of transformers")
    for _, experts in experts_modules(model):
        own: Any = experts.config
        own._experts_implementation_internal = BACKEND
    model.tie_weights()
    _keep_precision(model, dtype)
    return model


def _untie(model: PreTrainedModel, view: AnyView) -> None:
    """Take tied parameters apart that the checkpoint stores under several names with other values.

    transformers believes such a checkpoint more than its config.
    """
    for slot in slots(model):
        stored = {view.sources[name].names: name for name in slot.names if name in view.sources}
        if len(stored) < 2:
            continue
        first, *others = (view.parameter(name) for name in stored.values())
        if all(torch.equal(first, other) for other in others):
            continue
        for name in slot.names[1:]:
            owner, _, attribute = name.rpartition(".")
            apart = nn.Parameter(slot.empty.detach().clone(), requires_grad=slot.empty.requires_grad)
            model.get_submodule(owner)._parameters[attribute] = apart
            model.all_tied_weights_keys.pop(name, None)


def _keep_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make those parameters float32 that transformers keeps in float32, whatever the model's dtype."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    kept, globs, _ = build_glob_alternation(list(plan))
    for slot in slots(model):
        for name in slot.names:
            match = kept.search(name)
            if match is not None and match.lastgroup is not None and slot.empty.is_floating_point():
                slot.empty.data = slot.empty.data.to(plan[globs[match.lastgroup]])


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
