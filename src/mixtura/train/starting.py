"""A model that a training begins with in place of a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.data.tokens import vocabulary_size
from mixtura.errors import CheckpointError, UserError
from mixtura.running.loading import load_own_model

_CONFIG = "config.json"


def started(start: str, sequence_length: int, tokenizer: Any) -> tuple[Any, str]:
    """A model that there is, in float32, and its digest.

    Raises:
        CheckpointError: there is none.
        UserError: it is of another family, or does not go with the tokenizer or with so long sequences.
    """
    file = Path(start) / _CONFIG
    if not file.is_file():
        raise CheckpointError(f"{start} is not a model: it has no {_CONFIG}; give one of mixtura's own")
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if kind != "mixtura":
        raise UserError(
            f"{start} is a {kind} model, and `mixtura train` begins with models of mixtura's own; tune it "
            "with `mixtura tune`, or make one with `mixtura upcycle --target mixtura`"
        )
    model = load_own_model(start, torch.float32).train()
    num_tokens, most = vocabulary_size(tokenizer), model.config.max_position_embeddings
    if model.config.vocab_size < num_tokens:
        raise UserError(
            f"the tokenizer has {num_tokens} tokens, but {start} knows {model.config.vocab_size}; give "
            f"data.tokenizer={start}"
        )
    if most < sequence_length:
        raise UserError(f"sequence_length is {sequence_length}, but {start} has {most} positions; lower it")
    return model, checkpoint_digest(Path(start))
