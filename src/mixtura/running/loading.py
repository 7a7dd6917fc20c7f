"""Load a checkpoint to run it: an ordinary one, or one whose experts are stored in fewer bits.

Every tensor is read straight into the memory it stays in. Experts that the checkpoint stores in fewer
bits (the mixtura format, block-scaled FP8, MXFP4) stay in them and are decoded when they are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mixtura.checkpoints.nesting import Widths, check_named
from mixtura.checkpoints.skeleton import (
    CheckpointView,
    build,
    compute_buffers,
    empty_experts,
    open_checkpoint,
    read_slot,
)
from mixtura.checkpoints.slots import Slot, slots
from mixtura.checkpoints.stores import count_stores, keep_in_state
from mixtura.checkpoints.viewing.beside import adapter_of
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.checkpoints.viewing.packed import PackedLayer
from mixtura.errors import CheckpointError
from mixtura.kernels import quicken
from mixtura.kernels.saving import refuse_save
from mixtura.rerouting.restoring import load_router
from mixtura.rerouting.side_files import has_side_files
from mixtura.running.decoding import read_generation_config, take_generation_config
from mixtura.running.packing import packed_store
from mixtura.running.placing import add_adapter, chosen_device, placed, set_attention
from mixtura.running.tiers.opening import Wish, add_tiers, require_whole


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    bits: Widths | None = None,
    attn_implementation: str | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    memory: int | str | Wish | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint directory, ready to run, as transformers knows it.

    `generate`, pipelines and evaluation harnesses take it like any other model. One with experts in
    fewer bits cannot be saved, and those experts not trained; everything else about it is the same. An
    adapter beside the weights is loaded with them, as ``from_pretrained`` does.

    Args:
        path: a directory that `mixtura.apply_plan` or ``save_pretrained`` wrote, or a download.
        dtype: to compute in, and of the weights that are not in fewer bits; by default the one that
            the config names, else that of the weights.
        bits: at most how many bits to load of experts that the quantizer ``nested`` wrote: for all of
            them, or by decoder layer and expert, the others whole. The rest is neither read nor kept.
        attn_implementation: how attention is computed, by transformers' names, such as ``sdpa``.
        device_map: the one device for all of the model: ``cpu``, another as PyTorch calls it, ``auto`` for
            the accelerator if there is one; ``{"": device}`` says the same. Experts in fewer bits run on
            the CPU only, which ``auto`` then means.
        memory: bytes that this process may take, such as ``"8GiB"``, or a `Wish` that says more. Experts that
            do not find room in it stay on disk and are read when they are needed; what the model computes
            is the same, to the bit.

    Raises:
        CheckpointError: the directory is missing, incomplete or damaged.
        UnsupportedModelError: it is a model that mixtura cannot work on.
        UserError: ``bits`` asks for what the experts do not hold.
        SettingError: there is no such device or attention, or not for this model.
        BudgetError: ``memory`` is too little; the message says the smallest that is not.
    """
    device = chosen_device(device_map)
    wish = memory if isinstance(memory, Wish) or memory is None else Wish(memory=memory)
    if wish is not None:
        wish.check()
        require_whole(path, device, own=is_own_model(path))
    if is_own_model(path):
        check_named((), bits)
        model = load_own_model(path, dtype)
        set_attention(model, attn_implementation)
        return placed(model, device, packed=False)
    view = open_checkpoint(path, bits=bits)
    kind = adapter_of(view.path)
    model = build(view, dtype=dtype)
    # Small files first: what is wrong with them is said before the weights are read.
    take_generation_config(model, view.path)
    set_attention(model, attn_implementation)
    packed = _fill(model, view, wish)
    model = placed(model, device, packed=packed)
    if kind is not None:
        add_adapter(model, view.path, kind)
    quicken(model)
    if has_side_files(path):
        load_router(model, path)
    return model


def _fill(model: PreTrainedModel, view: CheckpointView, wish: Wish | None) -> bool:
    """Read a skeleton's weights; returns whether some are not plain numbers in memory: for the CPU only."""
    in_stores = wish is not None or bool(view.matrices)
    if wish is not None:
        add_tiers(model, view, wish)
    for layer in view.layers if wish is None else ():
        store = packed_store(view, layer)
        if store is not None:
            experts = empty_experts(model, layer)
            experts.mixtura_store = store
            keep_in_state(experts)
            in_stores = True
        else:
            _fill_experts(model, layer, view)
    _fill_rest(model, view)
    _finish(model, view.path)
    if wish is not None:
        refuse_save(model, "a model whose experts are on disk in part")
    elif in_stores:
        refuse_save(model, "a model with weights in fewer bits")
        count_stores(model)
    return in_stores


def is_own_model(path: str | Path) -> bool:
    """Whether a directory holds a model that `mixtura train` or `MixturaForCausalLM` wrote."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "mixtura"


def load_own_model(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A `MixturaForCausalLM` from the directory it was saved in, ready to run."""
    from mixtura.modeling.family import MixturaForCausalLM

    if not any(Path(path).glob("*.safetensors")):
        raise CheckpointError(f"{path} has no safetensors weights; save the model again")
    # transformers passes over one that it cannot read.
    read_generation_config(Path(path))
    model: PreTrainedModel = MixturaForCausalLM.from_pretrained(
        path, dtype="auto" if dtype is None else dtype, local_files_only=True
    )
    return model.eval()


def _fill_experts(model: PreTrainedModel, layer: DiskLayer | PackedLayer, view: CheckpointView) -> None:
    """Read the experts of a layer into its parameters, one expert at a time."""
    experts = model.get_submodule(layer.name)
    own = {slot.holders[0][1]: slot for slot in slots(model, (experts,))}
    parameters = layer.layout.parameters
    if all(view.sources[f"{layer.name}.{name}"].converter is None for name in parameters):
        for name in parameters:
            own[name].fill(view.parameter(f"{layer.name}.{name}"))
        return
    stacks = {name: torch.empty_like(own[name].empty.detach(), device="cpu") for name in parameters}
    for expert in range(layer.num_experts):
        for stack, tensor in zip(stacks.values(), layer.native_expert(expert), strict=False):
            assert tensor is not None
            stack[expert].copy_(tensor)
    for name, stack in stacks.items():
        own[name].fill(stack)


def _fill_rest(model: PreTrainedModel, view: CheckpointView) -> None:
    missing: list[Slot] = []
    for slot in slots(model):
        value = read_slot(slot, view)
        if value is None:
            missing.append(slot)
        else:
            slot.fill(value)
    if missing:
        compute_buffers(model, missing)


def _finish(model: PreTrainedModel, path: Path) -> None:
    """What transformers adds to a model that it loads."""
    model.name_or_path = str(path)
    model.config.name_or_path = str(path)
