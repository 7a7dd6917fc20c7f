"""LoRAs that were trained before, as what the LoRA experts of an adapter begin as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mixtura.adapting.layers import AdapterLayer
from mixtura.checkpoints.viewing.wrappers import plain_model
from mixtura.errors import CheckpointError, UserError
from mixtura.methods import declared_tags
from mixtura.types import LowRank

_PREFIX = "base_model.model."
# What makes a LoRA more than two matrices of one rank and scale at each layer.
_ODD = ("use_dora", "rank_pattern", "alpha_pattern", "target_parameters")


def start_from(model: Any, library: Sequence[str | Path], *, adapter_name: str = "default") -> None:
    """Let the LoRA experts of an adapter begin as LoRAs of PEFT's own type, one for each, in their order.

    Args:
        model: the model under PEFT, with an adapter tagged ``takes_library``.
        library: directories of LoRAs on linear layers, as many as the adapter has experts.
        adapter_name: which of the model's adapters.

    Raises:
        UserError: the adapter takes no LoRAs, or these are not as many, of a higher rank, or on other layers.
        CheckpointError: a directory holds no LoRA that can be read, or not a plain one.
    """
    layers = [one for one in plain_model(model).modules() if isinstance(one, AdapterLayer)]
    adapters = [one.adapter(adapter_name) for one in layers if adapter_name in one.mixtura_adapter]
    if not adapters:
        raise UserError(f"the model has no adapter of mixtura named {adapter_name!r}")
    if "takes_library" not in declared_tags(type(adapters[0])):
        raise UserError(f"{type(adapters[0]).__name__} does not begin with LoRAs; see the tag takes_library")
    loras = [_lora_of(Path(folder)) for folder in library]
    able = {one.site.name for one in adapters if hasattr(one, "a")}
    for folder, lora in zip(library, loras, strict=True):
        for name in lora.keys() - able:
            raise UserError(
                f"{folder} has a LoRA on {name}, where the adapter {adapter_name} has no experts; target "
                "that layer, too, or give LoRAs of other layers"
            )
    for one in adapters:
        if one.site.name in able:
            shape = one.site.matrices["weight"]
            nothing = LowRank(torch.zeros(1, 1, shape.cols), torch.zeros(1, shape.rows, 1), torch.ones(1))
            one.take([{"weight": lora.get(one.site.name, nothing)} for lora in loras])


def _lora_of(folder: Path) -> dict[str, LowRank]:
    """A LoRA's factors by the layer's name in the plain model."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no LoRA that can be read, adapter_config.json and its safetensors: {error}"
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{folder} holds an adapter of type {kind}; give ones of PEFT's type LORA")
    odd = [key for key in _ODD if config.get(key)]
    if odd:
        raise CheckpointError(
            f"{folder} is a LoRA with {odd[0]}, as which no expert can begin; give a plain one"
        )
    found = {}
    for key, a in tensors.items():
        name, part, _ = key.removeprefix(_PREFIX).partition(".lora_A.")
        if not part:
            continue
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        rank = a.shape[0]
        power = 0.5 if config.get("use_rslora") else 1.0
        scale = torch.tensor([float(config["lora_alpha"]) / rank**power], dtype=torch.float64)
        found[name] = LowRank(a[None], b[None], scale)
    if len(tensors) != 2 * len(found):
        raise CheckpointError(f"{folder} has more than the two matrices of each layer; give a plain LoRA")
    return found
