"""`mixtura tune`: tune a model with an adapter on one's own records."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli._places import check_folder
from mixtura.errors import UserError

if TYPE_CHECKING:
    from mixtura.train.tuning import TuneConfig, Tuned


Model = Annotated[
    str | None,
    typer.Argument(
        help="A directory, a hub id (owner/name, owner/name@revision), or nothing for the specimen."
    ),
]
Records = Annotated[
    Path,
    typer.Option(
        help='Records to learn from (.jsonl: "messages", "prompt" and "completion", "text"), text, or a '
        "directory of them."
    ),
]
AdapterName = Annotated[
    str, typer.Option(help="An adapter, by name or .py file. `mixtura methods adapters` lists them.")
]
HeldOut = Annotated[Path | None, typer.Option("--eval", help="Records that are measured and not learned.")]
Changes = Annotated[
    list[str],
    typer.Option(
        "--set", help="Change a setting, such as rank=16, learning_rate=1e-4, epochs=1, packing=off."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Directory of the tuning. Default: tuned/ADAPTER.")]


def tune(
    model: Model = None,
    *,
    data: Records,
    adapter: AdapterName = "expert_lora",
    eval_data: HeldOut = None,
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    out: Out = None,
    threads: int | None = typer.Option(None, min=1, help="CPU threads to tune with."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Learn from your records in a few thin matrices, or a few experts, beside a model that stays as it is.

    Of conversations and questions the answers are learned. A tuning that was stopped goes on where it was,
    exactly, when asked for again. What `mixtura fit` wrote is tuned in its own few bits.

    Example: `mixtura tune ./OLMoE-1B-7B --adapter esft --data answers.jsonl --eval held-out.jsonl`
    """
    from mixtura.train.tuning.config import parsed_changes, tune_config

    _check_data(data, eval_data)
    asked = tune_config(
        model,
        str(data),
        adapter=adapter,
        eval_data=None if eval_data is None else str(eval_data),
        changes=parsed_changes(changes),
    )
    directory = out or Path("tuned") / Path(adapter).stem
    if not directory.is_file():
        check_folder(directory)
    tuned = _tuned(asked, directory, threads, assume_yes=yes, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(tuned.to_dict()))
    else:
        _say(tuned)


def _check_data(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.exists():
            raise UserError(f"there is no {file}; give a file of records or text, or a directory of them")


def _tuned(
    asked: TuneConfig, directory: Path, threads: int | None, *, assume_yes: bool, progress: bool
) -> Tuned:
    import torch
    import transformers

    from mixtura.running.parallel.meeting import leave
    from mixtura.running.resolve import resolve_model
    from mixtura.train.tuning import run_tuning

    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    path = resolve_model(asked.model, assume_yes=assume_yes).path
    try:
        tuned = run_tuning(asked, directory, model_path=path, progress=progress)
        leave()
        return tuned
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from the last checkpoint in {directory}", err=True)
        raise


def _say(tuned: Tuned) -> None:
    from mixtura.report import counted, human_count

    loss = tuned.last.get("loss")
    typer.echo(
        f"{tuned.method}: {human_count(tuned.num_trained)} of {human_count(tuned.num_parameters)} parameters "
        f"trained in {counted(tuned.num_steps, 'step')} on {counted(tuned.num_examples, 'example')}"
        + (f", last loss {loss:.4f}" if loss is not None else "")
    )
    if tuned.eval_before is not None and tuned.eval_after is not None:
        typer.echo(
            f"loss on what was not learned: {tuned.eval_before:.4f} before, {tuned.eval_after:.4f} after"
        )
    if tuned.num_cut:
        typer.echo(f"{counted(tuned.num_cut, 'piece')} of longer examples were cut at the sequence length")
    typer.echo(f"the adapter is in {tuned.adapter}; mixtura generate MODEL --adapter {tuned.adapter} uses it")
