"""Observing whatever holds a model: one in memory, or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import nn

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.view import LayerView, MemoryView
from mixtura.data.tokens import TokenBatch
from mixtura.running.observing.checkpoint import observe_checkpoint
from mixtura.running.observing.passing import Observers, observe_model
from mixtura.types.trace import Trace


def observe(
    model: nn.Module | MemoryView | str | PathLike[str],
    tokens: TokenBatch,
    *,
    statistics: Sequence[str] = (),
    features: Sequence[str] = (),
    keep_choices: bool = False,
    keep_logits: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
    observers: Observers | None = None,
    layers: Sequence[LayerView] | None = None,
    source_digest: str | None = None,
) -> Trace:
    """Run a model over text once and record which experts its tokens really reach.

    What is recorded are the choices and weights as they enter the experts, so that every kind of
    router is right by construction. No expert runs on a token that was not routed to it, and padding
    reaches no expert. Afterwards the model is exactly as before, also after an error or Ctrl-C.

    Args:
        model: a causal language model of transformers with experts, also with adapters or compiled (it runs
            uncompiled), a view of one in memory, or the directory of a checkpoint, which is loaded if it fits
            in memory and streamed if not.
        tokens: the text, from `mixtura.data.tokens.encode_documents`; padding may be on any side.
        statistics: names of methods of the kind "statistics" to take of every assignment.
        features: what else to keep of every expert, by names of `mixtura.types.trace.FEATURES`.
        keep_choices: also keep every token's experts, and which token it is; grows with the text.
        keep_logits: of at most so many tokens, evenly over the text, also keep the logits of all routers.
        batch_tokens: tokens per forward, padding included; one sequence at least. By default 2048, or
            as many as working memory allows where every forward reads the model from disk.
        progress: show a bar on standard error, if that is a terminal.
        observers: makes one more observer for a layer, to see the same pass (`None`: for none).
        layers: the layers to record, for a model in memory whose experts are not its own parameters;
            found in the model if not given.
        source_digest: name of the weights for the trace, such as `checkpoints.digest.checkpoint_digest`
            of the directory they were loaded from, so that plans made of the trace apply to it; by
            default that of the directory, or of the config of a model in memory.

    Raises:
        UnknownNameError: no such statistic or feature.
        UserError: the text has no tokens.
        CheckpointError: routing weights or statistics become NaN or infinite.
        UnsupportedModelError: the model has no experts that mixtura can see.
    """
    if isinstance(model, str | PathLike):
        return observe_checkpoint(
            open_checkpoint(Path(model)),
            tokens,
            statistics=statistics,
            features=features,
            keep_choices=keep_choices,
            keep_logits=keep_logits,
            batch_tokens=batch_tokens,
            progress=progress,
            observers=observers,
        )
    return observe_model(
        model,
        tokens,
        statistics=statistics,
        features=features,
        keep_choices=keep_choices,
        keep_logits=keep_logits,
        batch_tokens=batch_tokens,
        progress=progress,
        observers=observers,
        layers=layers,
        source_digest=source_digest,
    )
