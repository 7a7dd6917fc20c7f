"""What a loaded model gets besides its weights: a device, a way to compute attention, an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mixtura.errors import CheckpointError, SettingError, UnsupportedModelError, UserError
from mixtura.running.adapters import register_type

_AUTO = "auto"


def chosen_device(device_map: str | int | torch.device | Mapping[str, Any] | None) -> torch.device | None:
    """The one device that a ``device_map`` names; `None` for the choice that suits the model.

    Raises:
        SettingError: it names several, or one that is not there.
    """
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        if len(set(device_map.values())) != 1 or "disk" in device_map.values():
            raise SettingError(
                f"mixtura.load puts a model on one device, but device_map names {dict(device_map)}; give one "
                "device, or use from_pretrained with experts_implementation='mixtura' to divide a model"
            )
        device_map = next(iter(device_map.values()))
    if device_map == _AUTO:
        return None
    try:
        device = torch.device(device_map)  # type: ignore[arg-type]
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SettingError(
            f"device_map names {device_map!r}, which is no device here ({reason}); give cpu, auto or a "
            "device that PyTorch finds"
        ) from None
    if device.type == "meta":
        raise SettingError("device_map names the device 'meta', which holds no numbers; give cpu or auto")
    return device


def placed(model: PreTrainedModel, device: torch.device | None, *, packed: bool) -> PreTrainedModel:
    """The model on a device; on the accelerator, if there is one and the model can run there, if None.

    Raises:
        SettingError: experts in fewer bits would have to run elsewhere than on the CPU.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = torch.device("cpu") if packed or found is None else found
    if packed and device.type != "cpu":
        raise SettingError(
            f"experts in fewer bits run on the CPU only, not on {device}; leave device_map out, or give an "
            "ordinary checkpoint"
        )
    return model if device.type == "cpu" else model.to(device)


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Compute attention in another way than the model's default.

    Raises:
        SettingError: transformers has no such way, or not for this model, or not here.
    """
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise SettingError(
            f"attn_implementation {name!r} cannot be had for this model ({reason[:200]}); leave it out, or "
            "give sdpa or eager"
        ) from None


def add_adapter(model: PreTrainedModel, path: Path, kind: str) -> None:
    """Load the adapter that lies beside a model's weights, as ``from_pretrained`` does.

    Raises:
        UnsupportedModelError: PEFT is missing.
        CheckpointError: the adapter does not fit the model.
    """
    try:
        register_type(kind)
    except UserError:
        raise UnsupportedModelError(
            f"{path} holds an adapter ({kind}), which takes PEFT to load; install peft, or delete "
            "adapter_config.json if the model is to run without it"
        ) from None
    try:
        model.load_adapter(str(path))
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the adapter ({kind}) in {path} does not fit the model: {reason[:300]}; "
            "train or download it again"
        ) from None
    model.eval()
