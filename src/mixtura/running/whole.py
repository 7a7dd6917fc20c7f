"""Any model in memory by transformers alone, dense ones and those of mixtura's own kind, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtura.checkpoints.viewing.headers import read_header
from mixtura.checkpoints.viewing.opening import open_files, read_json
from mixtura.errors import CheckpointError, UnsupportedModelError


def load_whole(path: Path, *, dtype: Any = "auto") -> Any:
    """A model in evaluation, every weight of it from its files.

    What transformers would initialise at random where a file lacks it is refused; no code and no pickle that
    lies beside the weights is run.

    Args:
        path: A directory of a model with weights in safetensors.
        dtype: That of the weights in memory; what the model says unless given.

    Raises:
        CheckpointError: it is no model, it is damaged, or weights are missing or of other shapes.
        UnsupportedModelError: the installed transformers does not know it.
    """
    from transformers import AutoModelForCausalLM

    import mixtura.modeling.family  # noqa: F401  makes models of our own known

    _require_readable(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot load {path}: {reason}") from None
    missing = sorted(str(name) for name in info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the files of {path} lack {len(missing)} of the weights that its config.json says, the first "
            f"{missing[0]}; download or write it again"
        )
    return model.eval()


def load_any(path: Path, *, dtype: Any = None) -> Any:
    """A model as `mixtura.running.loading.load` reads it where it has experts, and a dense one whole.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedModelError: it has experts that mixtura cannot run.
    """
    from mixtura.running.loading import load

    try:
        return load(path, dtype=dtype)
    except UnsupportedModelError:
        if not is_dense(path):
            raise
    return load_whole(path, dtype=dtype or "auto")


def is_dense(path: Path) -> bool:
    """Whether a model has no experts, by its class built without memory."""
    from mixtura.checkpoints.viewing.meta import build_from_config
    from mixtura.checkpoints.viewing.wrappers import experts_modules

    return next(experts_modules(build_from_config(open_files(path).config)), None) is None


def _require_readable(path: Path) -> None:
    """Refuse what has no readable config and headers, as every reading of a checkpoint does."""
    if not (path / "config.json").is_file():
        open_files(path)
    if read_json(path / "config.json", "give the directory of a model").get("model_type") != "mixtura":
        open_files(path)
        return
    for file in path.glob("*.safetensors"):
        read_header(file)
