"""Tuning from Python in one call."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from mixtura.train.tuning.config import tune_config
from mixtura.train.tuning.run import Tuned, run_tuning


def tune(
    model: str | PathLike[str] | None,
    data: str | PathLike[str],
    out: str | PathLike[str],
    *,
    adapter: str = "expert_lora",
    eval_data: str | PathLike[str] | None = None,
    progress: bool = True,
    **changes: Any,
) -> Tuned:
    """Tune a model with an adapter on a file of records, as `mixtura tune` does.

    Args:
        model: a directory, a hub id whose model is on this machine, or None for the specimen.
        data: records (.jsonl with "messages", "prompt" and "completion", or "text") or text.
        out: the directory of the tuning, in which ``adapter`` is written; a tuning that is there goes on.
        adapter: an adapter's name or the path of its file.
        eval_data: what is measured and not learned.
        progress: whether to show a bar.
        changes: settings of the adapter, the data and the training by name, such as ``rank=16``,
            ``learning_rate=1e-4`` or ``epochs=1``; see `mixtura.train.tuning.config`.

    Raises:
        UserError: something of this cannot be; the message says what and what to do.
    """
    from mixtura.running.resolve import resolve_model

    asked = tune_config(
        None if model is None else str(model),
        str(data),
        adapter=adapter,
        eval_data=None if eval_data is None else str(eval_data),
        changes=changes,
    )
    return run_tuning(asked, Path(out), model_path=resolve_model(asked.model).path, progress=progress)
