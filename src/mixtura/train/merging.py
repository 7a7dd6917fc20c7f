"""An adapter merged into its model's weights, written as an ordinary checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mixtura.checkpoints.viewing.beside import require_alone
from mixtura.errors import CheckpointError, OutputError, UnsupportedModelError, UserError, one_line
from mixtura.running.adapters import adapter_config, with_adapter
from mixtura.train.tuning.models import load_base

# Files beside a model's weights that a model merged with an adapter needs as well.
_BESIDE = ("generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE")


def merge(adapter: Path, model: Path, out: Path) -> Path:
    """Write the ordinary checkpoint of a model with an adapter merged into its weights.

    Args:
        adapter: the directory of the adapter.
        model: the directory of the model that it was trained on.
        out: where to write; a directory that is not there yet.

    Raises:
        CheckpointError: the adapter does not fit the model, or one of the two is damaged.
        UserError: the method decides for every token, or the experts are stored in fewer bits.
        OutputError: the directory is there, or cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out} is there already and is left as it is; give another directory")
    adapter_config(adapter)
    require_alone(model, "the merged model")
    merged = _merged(with_adapter(load_base(model), adapter), adapter)
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        merged.save_pretrained(aside)
        for file in _side_files(model):
            if not (aside / file.name).exists():
                shutil.copy2(file, aside / file.name)
        aside.rename(out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OutputError(f"cannot write {out}: {error.strerror}") from None
    return out


@torch.no_grad()
def _merged(model: Any, adapter: Path) -> Any:
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise CheckpointError(f"the adapter in {adapter} cannot be merged: {one_line(error, 300)}") from None
    if not hasattr(merged, "save_pretrained"):
        raise UnsupportedModelError(f"{type(merged).__name__} cannot be saved")
    return merged


def _side_files(model: Path) -> list[Path]:
    tokenizer = [
        p for p in model.glob("*.json") if p.name.startswith(("tokenizer", "special_tokens", "vocab"))
    ]
    others = [model / name for name in _BESIDE if (model / name).is_file()]
    return [*tokenizer, *others, *model.glob("*.model"), *model.glob("merges.txt"), *model.glob("*.tiktoken")]
