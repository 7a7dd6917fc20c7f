"""Adapters that lie in a directory of their own, put on a model."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mixtura.checkpoints.viewing.beside import adapter_of
from mixtura.checkpoints.viewing.headers import read_header
from mixtura.checkpoints.viewing.opening import read_json
from mixtura.checkpoints.viewing.weight_files import ADAPTER_CONFIG
from mixtura.errors import CheckpointError, UserError, one_line

_TYPE = "MIXTURA"


def register_type(kind: str) -> None:
    """Make a kind of adapter known to PEFT where it is ours.

    Raises:
        UserError: PEFT is missing.
    """
    if find_spec("peft") is None:
        raise UserError("adapters need PEFT; install mixtura[peft]")
    if kind == _TYPE:
        import mixtura.adapting  # noqa: F401 - registers it


def adapter_config(path: Path) -> dict[str, Any]:
    """What an adapter's directory says of it.

    Raises:
        CheckpointError: it is no adapter, or a damaged one.
    """
    if path.is_file() or not path.exists():
        raise CheckpointError(f"there is no directory {path}; give the one that holds {ADAPTER_CONFIG}")
    if adapter_of(path) is None:
        inner = path / "adapter"
        hint = f"; did you mean {inner}?" if (inner / ADAPTER_CONFIG).is_file() else ""
        raise CheckpointError(f"{path} is not an adapter: it has no {ADAPTER_CONFIG}{hint}")
    found: dict[str, Any] = read_json(path / ADAPTER_CONFIG, "tune or download it again")
    return found


def with_adapter(model: Any, path: Path, name: str = "default") -> Any:
    """A model under PEFT with the adapter of a directory, ready to run; beside others that it has already.

    Raises:
        CheckpointError: the directory holds no adapter, or one of another model.
        UserError: PEFT is missing, or PEFT knows the adapters of the model by another type than this one.
    """
    kind = str(adapter_config(path).get("peft_type", "?"))
    register_type(kind)
    from peft import PeftModel

    if isinstance(model, PeftModel):
        _require_kind(model, kind, path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT asks transformers for what newer releases call otherwise.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, str(path), adapter_name=name)
            else:
                model.load_adapter(str(path), adapter_name=name)
    except UserError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        raise CheckpointError(
            f"the adapter ({kind}) in {path} does not fit the model: {one_line(error, 300)}; give the model "
            "that it was trained on"
        ) from None
    if kind == _TYPE:
        from mixtura.adapting.selecting import narrow

        narrow(model, name)
    return model.eval()


def _require_kind(adapted: Any, kind: str, path: Path) -> None:
    for name, config in adapted.peft_config.items():
        if str(config.peft_type.value) != kind:
            raise UserError(
                f"the adapter in {path} is of the type {kind} and {name} is of {config.peft_type.value}: one "
                "model takes adapters of one type; serve them apart"
            )


def adapter_bytes(path: Path) -> int:
    """Memory that the adapter of a directory takes on a model: its values, in float32 at most.

    Raises:
        CheckpointError: it is no adapter, or a damaged one.
    """
    adapter_config(path)
    files = [*path.glob("*.safetensors")]
    entries = [entry for file in files for entry in read_header(file).values()]
    return sum(4 * torch.Size(entry.shape).numel() for entry in entries)


def base_of(path: Path, base: str | None) -> str:
    """The model that an adapter belongs to: the one given, else the one it was trained on.

    Raises:
        CheckpointError: the adapter does not say, or what it says is not here.
    """
    named = base or adapter_config(path).get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"the adapter in {path} does not say what model it is of; give it with --base")
    return str(named)


def ready_to_run(model: Any, path: Path, *, merge: bool = True) -> Any:
    """A model of transformers with the adapter of a directory: merged in memory where that can be.

    Merged, every layer runs as fast as the model alone. A method that decides for every token, and experts in
    fewer bits, run unmerged.

    Raises:
        CheckpointError: the directory holds no adapter, or one of another model.
        UserError: PEFT is missing.
    """
    adapted = with_adapter(model, path)
    if merge and _can_merge(adapted):
        return adapted.merge_and_unload()
    return adapted.get_base_model()


def _can_merge(adapted: Any) -> bool:
    config = adapted.peft_config[adapted.active_adapter]
    stored = any(hasattr(module, "mixtura_store") for module in adapted.modules())
    return not stored and (str(config.peft_type) != _TYPE or "mergeable" in config.tags)
