"""The model that is tuned: loaded with its experts as they are stored, and tried for packed documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixtura.errors import CheckpointError, UnsupportedModelError, UserError
from mixtura.methods import header
from mixtura.train.tuning.config import TuneConfig

_SAME = 1e-3


def check_model(path: Path, config: TuneConfig) -> None:
    """Refuse what is no model, or more than its weights say, before anything is read of it.

    Raises:
        CheckpointError: it is no directory of a model.
        UnsupportedModelError: an adapter or other routers lie beside its weights.
    """
    from mixtura.checkpoints.viewing.beside import require_alone

    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a model: it has no config.json; give a transformers model")
    require_alone(path, f"what {config.adapter.method} learns")


def load_base(path: Path, config: TuneConfig | None = None) -> Any:
    """The model in memory, its experts in the bits they are stored in; a dense one by transformers.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedModelError: it has no experts and the method changes experts, or mixtura cannot run it.
    """
    from mixtura.running.loading import load
    from mixtura.running.whole import is_dense, load_whole

    try:
        return load(path)
    except UnsupportedModelError:
        wants = config is None or "changes:experts" in header("adapters", config.adapter.method).tags
        if wants and not is_dense(path):
            raise
        if wants and config is not None:
            raise UnsupportedModelError(
                f"{path} has no experts that mixtura knows, and {config.adapter.method} changes experts; "
                "choose an adapter that changes linear layers, such as lora"
            ) from None
    return load_whole(path)


@torch.no_grad()
def splits_documents(model: Any, tokenizer: Any, config: TuneConfig) -> bool:
    """Whether documents may share sequences: positions that start again keep them apart in this model.

    Two documents are run together and each alone; models that carry a state from token to token, or count
    positions in ways of their own, are found out so.

    Raises:
        UserError: packing is asked for, and the model does not keep documents apart.
    """
    if config.data.packing == "off":
        return False
    highest = min(int(model.config.get_text_config().vocab_size), len(tokenizer))
    drawn = torch.randint(0, highest, (1, 14), generator=torch.Generator().manual_seed(0))
    ids, cut = drawn.to(model.device), 6
    positions = torch.cat([torch.arange(cut), torch.arange(ids.shape[1] - cut)])[None].to(model.device)
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat(
        [model(input_ids=part, use_cache=False).logits for part in (ids[:, :cut], ids[:, cut:])], dim=1
    )
    scale = float(alone.float().abs().max())
    # In 16 bits the order of a sum shows; documents that run into each other show more.
    tolerance = _SAME if alone.dtype in (torch.float32, torch.float64) else 0.05
    apart = float((together - alone).float().abs().max()) <= tolerance * scale
    if config.data.packing == "on" and not apart:
        raise UserError(
            f"{type(model).__name__} does not keep documents apart that share a sequence; leave packing out, "
            "and each has a sequence of its own"
        )
    return apart
