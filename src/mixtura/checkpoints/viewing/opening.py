"""From a path to a config and the headers of its safetensors files, or the reason why not."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtura.checkpoints.viewing.headers import TensorEntry, read_header
from mixtura.checkpoints.viewing.refusals import (
    OUTSIDE_CONTRACT,
    READABLE_FORMATS,
    refuse_quantized,
    refuse_without_experts,
)
from mixtura.errors import CheckpointError, UnsupportedModelError, suggest

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PICKLE_ADVICE = (
    "{where} is a pickle, which can run code when it is read; use a safetensors checkpoint, or convert it "
    "with save_pretrained"
)
_READABLE_METHODS = ("fp8", "mxfp4")
# How the tensors of formats that are not read are called, where the config does not name them.
_PACKED_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
}


@final
@dataclass(frozen=True, slots=True)
class OpenedFiles:
    """A checkpoint directory: its raw ``config.json``, transformers' config and every stored tensor."""

    path: Path
    raw_config: dict[str, Any]
    config: Any
    files: tuple[Path, ...]
    entries: dict[str, TensorEntry]


def open_files(
    model: str | PathLike[str], *, restore: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> OpenedFiles:
    """Read the config and the headers of a checkpoint directory; no weights.

    ``restore`` turns a raw config into that of the checkpoint it was made from.

    Raises `CheckpointError` or `UnsupportedModelError`, saying what is wrong and what to do.
    """
    path = Path(model)
    _refuse_other_files(path)
    raw = _read_json(path / "config.json", "give the directory of a transformers model")
    if restore is not None:
        raw = restore(raw)
    _refuse_quantization(raw)
    config = _read_config(path, raw, restored=restore is not None)
    files, listed = _weight_files(path)
    entries: dict[str, TensorEntry] = {}
    with no_collection():
        for file in files:
            entries.update(read_header(file))
    _refuse_packed_names(entries)
    for name, file in listed.items():
        if name not in entries or entries[name].file is not file:
            raise CheckpointError(
                f"{file} does not hold {name}, which {_INDEX} says it does; download the checkpoint again"
            )
    return OpenedFiles(path, raw, config, files, entries)


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the garbage collector: with hundreds of thousands of new records it scans everything again
    and again, which takes longer than reading them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_other_files(path: Path) -> None:
    only_gguf = any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    if path.suffix == ".gguf" or only_gguf:
        raise UnsupportedModelError(
            f"{path} is a GGUF model, which mixtura does not read; use the original safetensors "
            f"checkpoint ({READABLE_FORMATS} are read)"
        )
    if not path.exists():
        raise CheckpointError(f"there is no directory {path}; check the path of the model")
    if not path.is_dir() and any(path.match(pattern) for pattern in _PICKLES):
        raise UnsupportedModelError(_PICKLE_ADVICE.format(where=path))
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the weights")


def _read_json(file: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} is not a model: it has no {file.name}; {advice}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; download or write it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object; download or write it again")
    return content


def _refuse_quantization(raw: dict[str, Any]) -> None:
    for owner in (raw, raw.get("text_config")):
        quantization = owner.get("quantization_config") if isinstance(owner, dict) else None
        if quantization is None:
            continue
        method = str(quantization.get("quant_method", "an unnamed method"))
        if method not in _READABLE_METHODS:
            refuse_quantized(method)


def _refuse_packed_names(entries: dict[str, TensorEntry]) -> None:
    """Quantised weights whose config does not say so."""
    suffixes = tuple(_PACKED_SUFFIXES)
    for name in entries:
        if name.endswith(suffixes):
            refuse_quantized(
                next(method for suffix, method in _PACKED_SUFFIXES.items() if name.endswith(suffix))
            )


def _read_config(path: Path, raw: dict[str, Any], *, restored: bool) -> Any:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} is not a transformers model: its config.json names no model_type")
    if model_type in OUTSIDE_CONTRACT:
        refuse_without_experts(model_type)
    if model_type == "mixtura":
        raise UnsupportedModelError(
            f"{path} is a model of mixtura's own kind, whose layers are of no ordinary family; "
            "run it with mixtura.load, or write it as one with mixtura.export if it has one's parts"
        )
    if model_type not in CONFIG_MAPPING:
        custom = " and its own code is never run" if "auto_map" in raw else ""
        raise UnsupportedModelError(
            f"the installed transformers has no model type {model_type!r}{custom}; "
            f"{suggest(model_type, list(CONFIG_MAPPING.keys()))}"
        )
    try:
        if restored:
            cls = CONFIG_MAPPING[model_type]
            # transformers writes infinities as tagged objects and undoes that when it reads a file itself.
            return cls.from_dict(cls._decode_special_floats(copy.deepcopy(raw)))
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Whatever a family's own validation raises, it is the file that is wrong.
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path / 'config.json'} is not a valid config: {reason}") from None


def _weight_files(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The shards, and where the index says each tensor is (empty without an index)."""
    if (path / _INDEX).exists():
        weight_map = _read_json(path / _INDEX, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / _INDEX} has no weight_map; download it again")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
                raise CheckpointError(
                    f"{path / _INDEX} names {file!r}, which is no file of this directory; download it again"
                )
        # One path per shard, not per tensor: there may be a hundred thousand of those.
        shards = {file: path / file for file in set(weight_map.values())}
        listed = {name: shards[file] for name, file in weight_map.items()}
        files = tuple(sorted(shards.values()))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of {len(files)} weight files, the first {missing[0]}; "
                "finish the download"
            )
        return files, listed
    if (path / _SINGLE).exists():
        return (path / _SINGLE,), {}
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise UnsupportedModelError(_PICKLE_ADVICE.format(where=path / pickles[0]))
    raise CheckpointError(f"{path} has no weights: neither {_SINGLE} nor {_INDEX}; finish the download")
