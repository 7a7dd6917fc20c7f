"""Observing a checkpoint on disk: its tokenizer, its text, in memory if it fits and streamed if not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import text as data_text
from mixtura.data.tokens import TokenBatch, encode_documents, num_embeddings_of
from mixtura.running.loading import load
from mixtura.running.memory.available import available_bytes
from mixtura.running.observing.passing import Observers, observe_model
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed
from mixtura.types.trace import Trace

_CHARS_PER_TOKEN = 8
_SHARE_OF_MEMORY = 0.7


def read_text(
    view: CheckpointView, text: Path | None, *, max_tokens: int, max_length: int, seed: int = 0
) -> TokenBatch:
    """A user's text, or calibration text of three domains, in the tokens of a model.

    Sequences are at most `max_length` tokens, and never longer than the model's positions.

    Raises:
        CheckpointError: the model has no tokenizer.
        UserError: the text is missing, empty, too short or not text.
    """
    tokenizer = load_tokenizer(view.path)
    positions = getattr(view.config.get_text_config(), "max_position_embeddings", None) or max_length
    if text is None:
        documents = data_text.calibration(_CHARS_PER_TOKEN * max_tokens, seed=seed)
    else:
        documents = data_text.read(text, tokenizer)
    return encode_documents(
        documents,
        tokenizer,
        max_length=min(max_length, positions),
        max_tokens=max_tokens,
        num_embeddings=num_embeddings_of(view.config),
    )


def observe_checkpoint(
    view: CheckpointView,
    tokens: TokenBatch,
    *,
    statistics: Sequence[str] = (),
    features: Sequence[str] = (),
    keep_choices: bool = False,
    keep_logits: int = 0,
    batch_tokens: int | None = None,
    observers: Observers | None = None,
    progress: bool = True,
    stream: bool | None = None,
) -> Trace:
    """Observe a checkpoint on disk; see `mixtura.running.observing.observe`.

    Args:
        view: the checkpoint, from `mixtura.checkpoints.skeleton.open_checkpoint`.
        tokens: the text, in the model's own tokens.
        statistics: names of methods of the kind "statistics".
        features: what else to keep of every expert, by names of `mixtura.types.trace.FEATURES`.
        keep_choices: also keep every token's experts, and which token it is.
        keep_logits: of at most so many tokens, evenly over the text, also keep the logits of all routers.
        batch_tokens: tokens per forward; chosen by how it runs if not given.
        observers: makes one more observer for a layer.
        progress: show a bar on standard error, if that is a terminal.
        stream: run it layer by layer from disk instead of loading it; by default, if its weights
            would take most of the memory that is free.

    Raises:
        CheckpointError: the directory is missing, incomplete or damaged.
        UnsupportedModelError: it is a model that mixtura cannot work on.
        UnknownNameError: no such statistic or feature.
    """
    if stream is None:
        stream = view.num_bytes > _SHARE_OF_MEMORY * available_bytes()
    if stream:
        streamed, width = Streamed(view), int(tokens.attention_mask.sum(1).max())
        model = streamed.model
        # Every forward reads the model from disk, so it takes as much text as the bound allows.
        batch_tokens = batch_tokens or max(1, DEFAULT_WORKING_BYTES // streamed.bytes_per_token(width))
    else:
        model = load(view.path)
    trace = observe_model(
        model,
        tokens,
        statistics=statistics,
        features=features,
        keep_choices=keep_choices,
        keep_logits=keep_logits,
        batch_tokens=batch_tokens,
        progress=progress,
        observers=observers,
        layers=view.layers,
        source_digest=checkpoint_digest(view.path),
    )
    return replace(trace, step=step_of(view.path))


def step_of(path: Path) -> int | None:
    """The optimizer step of a checkpoint that a `Trainer` wrote; None where the directory does not say."""
    try:
        step = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        found = re.fullmatch(r"checkpoint-(\d+)", path.name)
        return int(found[1]) if found else None
    return step if isinstance(step, int) else None
