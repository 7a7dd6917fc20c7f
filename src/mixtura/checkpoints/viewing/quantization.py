"""What a checkpoint says of the number formats of its weights, and the sentence where they are not read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixtura.checkpoints.viewing.formats import Decoder, StoredTensor
from mixtura.checkpoints.viewing.mapping import Source, leads_to_parameter
from mixtura.checkpoints.viewing.refusals import refuse_quantized
from mixtura.errors import CheckpointError

_READABLE_METHODS = ("fp8", "mxfp4")
# Where ModelOpt says what it did to the weights.
_MODELOPT_FILE = "hf_quant_config.json"
# How the tensors of formats that are not read are called, where the config does not name them.
_PACKED_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
}


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a ``config.json``, its own or a part's; empty where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    found = next(iter(_quantizations(raw)), None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError("quantization_config in config.json must be a JSON object; correct it")
    return found or {}


def fp8_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size that a config states for FP8 weights; `None` where it states none.

    Raises:
        CheckpointError: what it states is no block size.
    """
    block = quantization_of(raw).get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise CheckpointError(
            f"weight_block_size in config.json must be two positive numbers, rows and columns, "
            f"got {block!r}; correct it"
        )
    return block[0], block[1]


def refuse_by_config(raw: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` where a config names a quantisation that is not read."""
    stated = quantization_of(raw)
    if not stated:
        return
    method = stated.get("quant_method") or ("modelopt" if "quant_algo" in stated else "an unnamed method")
    if method not in _READABLE_METHODS:
        details = (stated.get(key) for key in ("quant_algo", "format"))
        refuse_quantized(str(method), next((one for one in details if isinstance(one, str)), None))


def stated_format(path: Path, raw: Mapping[str, Any]) -> str | None:
    """What a checkpoint calls the format of its experts, where it is one that needs its scales to be read."""
    stated: list[Any] = [quantization_of(raw).get("expert_dtype"), raw.get("expert_dtype")]
    try:
        modelopt = json.loads((path / _MODELOPT_FILE).read_text(encoding="utf-8"))
        stated.append(modelopt["quantization"]["quant_algo"])
    except (OSError, ValueError, KeyError, TypeError):
        # The file is only asked for a name: without one, the tensors themselves say what they are.
        pass
    return next((name.upper() for name in stated if isinstance(name, str) and name.lower() != "fp8"), None)


def refuse_by_names(names: Iterable[str], model: nn.Module) -> None:
    """Raise `UnsupportedModelError` where weights of the model are packed and no config says so."""
    suffixes = tuple(_PACKED_SUFFIXES)
    for name in names:
        if name.endswith(suffixes):
            suffix = next(one for one in suffixes if name.endswith(one))
            # A layer that the model does not have may be stored in any way.
            if leads_to_parameter(model, f"{name.removesuffix(suffix).removesuffix('.weight')}.weight"):
                refuse_quantized(_PACKED_SUFFIXES[suffix])


def check_readable(
    decoder: Decoder,
    sources: Mapping[str, Source],
    stored: Mapping[str, StoredTensor],
    floating: Mapping[str, bool],
    stated: str | None,
) -> None:
    """Raise where a tensor that the model needs cannot be decoded, before shapes are compared.

    Args:
        decoder: reads the checkpoint's tensors.
        sources: by parameter, what it is made of.
        stored: the checkpoint's tensors.
        floating: whether the model computes with a parameter as a floating-point number.
        stated: what the checkpoint calls the format, from `stated_format`.
    """
    checked: set[int] = set()
    for target, source in sources.items():
        if id(source) in checked:
            continue
        checked.add(id(source))
        for name in source.names:
            tensor = stored[name]
            if tensor.unread is not None or tensor.kind == "fp8":
                decoder.check(tensor, stated)
            elif floating.get(target, False) and _is_integer(tensor.kind):
                decoder.refuse(tensor, stated or f"{tensor.kind} without scales")


def _is_integer(kind: str) -> bool:
    dtype = getattr(torch, kind, None)
    return isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex)


def _quantizations(raw: Mapping[str, Any]) -> Iterator[Any]:
    """Every ``quantization_config``, the outermost first."""
    if raw.get("quantization_config") is not None:
        yield raw["quantization_config"]
    for key, part in raw.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(part, dict):
            yield from _quantizations(part)
