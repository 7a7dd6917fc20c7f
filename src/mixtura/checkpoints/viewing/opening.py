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
from mixtura.checkpoints.viewing.quantization import refuse_by_config
from mixtura.checkpoints.viewing.refusals import OUTSIDE_CONTRACT, READABLE_FORMATS, refuse_without_experts
from mixtura.checkpoints.viewing.weight_files import (
    ADAPTER_CONFIG,
    INDEX_SUFFIX,
    PICKLE_ADVICE,
    PICKLE_SUFFIXES,
    first_file,
    stand_in,
    weight_map,
    without_weights,
)
from mixtura.errors import CheckpointError, UnsupportedModelError, suggest


@final
@dataclass(frozen=True, slots=True)
class OpenedFiles:
    """A checkpoint directory: its raw ``config.json``, transformers' config and every stored tensor.

    ``stated_dtype`` is what the index of its files names, if it does.
    """

    path: Path
    raw_config: dict[str, Any]
    config: Any
    files: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    stated_dtype: str | None = None


def open_files(
    model: str | PathLike[str], *, restore: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> OpenedFiles:
    """Read the config and the headers of a checkpoint directory; no weights.

    ``restore`` turns a raw config into that of the checkpoint it was made from.

    Raises `CheckpointError` or `UnsupportedModelError`, saying what is wrong and what to do.
    """
    path = Path(model)
    _refuse_other_files(path)
    raw = read_json(path / "config.json", _advice(path))
    if restore is not None:
        raw = restore(raw)
    refuse_by_config(raw)
    config = _read_config(path, raw, restored=restore is not None)
    first = first_file(lambda name: (path / name).is_file(), raw)
    if first is None:
        raise without_weights([file.name for file in path.iterdir()], path)
    is_index = first.endswith(INDEX_SUFFIX)
    index = read_json(path / first, "download it again") if is_index else {}
    files, listed = _shards(path, first, index) if is_index else ((path / first,), {})
    entries: dict[str, TensorEntry] = {}
    with no_collection():
        for file in files:
            # Another file may hold a copy of a tensor, left from before; the index says which one is meant.
            entries.update({n: e for n, e in read_header(file).items() if listed.get(n, file) is file})
    for name, file in listed.items():
        if name not in entries:
            raise CheckpointError(
                f"{file} does not hold {name}, which {first} says it does; download the checkpoint again"
            )
    metadata = index.get("metadata")
    dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
    return OpenedFiles(path, raw, config, files, entries, dtype if isinstance(dtype, str) else None)


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
    if not path.is_dir() and path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedModelError(PICKLE_ADVICE.format(where=path))
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the weights")


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        CheckpointError: it is not there, for which there is ``advice``, or cannot be read.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} is not a model: it has no {file.name}; {advice}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}; download or write it again") from None
    instead = stand_in(content)
    if instead is not None:
        raise CheckpointError(f"{file} {instead}")
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"cannot read {file}: {error}; download or write it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object; download or write it again")
    return values


def _advice(path: Path) -> str:
    """What to give in place of a directory that holds no model."""
    inside = sorted(
        file.parent for pattern in ("*", "snapshots/*") for file in path.glob(f"{pattern}/config.json")
    )
    if (path / ADAPTER_CONFIG).is_file():
        return "it holds an adapter; merge that into its model (merge_and_unload of PEFT) and give the result"
    if inside:
        return f"give {inside[0]}, which does"
    return "give the directory of a transformers model"


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


def _shards(path: Path, first: str, index: dict[str, Any]) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The files an index names, and where it says each tensor is."""
    folder = (path / first).parent
    names = weight_map(index, path / first)
    # One path per shard, not per tensor: there may be a hundred thousand of those.
    shards = {file: folder / file for file in set(names.values())}
    files = tuple(sorted(shards.values()))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(files)} weight files, the first {missing[0]}; "
            "finish the download"
        )
    return files, {name: shards[file] for name, file in names.items()}
