"""`mixtura train`: train a mixture-of-experts language model of one's own."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._places import check_folder
from mixtura.errors import UserError

if TYPE_CHECKING:
    from mixtura.train.config import TrainConfig
    from mixtura.train.run import Trained


def train(
    config: Path | None = typer.Argument(None, help="A YAML file; examples/train.yaml explains every key."),
    changes: list[str] = typer.Option([], "--set", help="Change a key of it, such as router=ada_moe."),
    recipe: str | None = typer.Option(None, help="A published model instead of a file: docs/recipes.md."),
    scale: str | None = typer.Option(None, help="Of a recipe: published (default) or tiny."),
    experts: str | None = typer.Option(None, help="The experts, by name, such as latent."),
    form: str | None = typer.Option(None, help="The form of MoE layers, by name, such as chain."),
    attention: str | None = typer.Option(None, help="The attention, by name, such as sparse_heads."),
    out: Path | None = typer.Option(None, help="Directory of the training. Default: runs/NAME."),
    expert_parallel: int = typer.Option(
        1, min=1, help="Processes that share the experts, started by this command unless torchrun did."
    ),
    threads: int | None = typer.Option(None, min=1, help="CPU threads to train with."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train a model whose routers, mixers, experts, forms, attentions and balancers are chosen by name.

    A training that was stopped goes on where it was, exactly, when asked for again. With several
    processes: `torchrun --nproc-per-node 2 --no-python mixtura train ...`. `--expert-parallel 4` lays experts
    on four processes, each with its own tokens; checkpoints are those of one.

    `mixtura methods` lists what there is: routers, mixers, experts, forms, attentions, balancers.

    Example: `mixtura train examples/train.yaml --set router=ada_moe --set num_steps=200`
    Example: `mixtura train --recipe ling_plus --scale tiny`
    Example: `mixtura train --set start=./upcycled --set tokenizer=./upcycled --set text=./texts`
    """
    chosen = {"experts": experts, "form": form, "attention": attention}
    named = [f"{key}={name}" for key, name in chosen.items() if name is not None]
    read, name = _read(config, recipe, scale, [*named, *changes])
    directory = out or Path("runs") / name
    if not directory.is_file():
        check_folder(directory)
    if _handed_on(expert_parallel, directory):
        return
    import torch
    import transformers

    from mixtura.running.parallel.meeting import leave
    from mixtura.train.run import train as run_training

    # Its successor is not in all releases of PyTorch that are supported.
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        trained = run_training(read, directory, progress=not as_json, expert_parallel=expert_parallel)
        leave()
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from the last checkpoint in {directory}", err=True)
        raise
    except RuntimeError as error:
        _say_lost(error, expert_parallel, directory)
        raise
    if os.environ.get("RANK", "0") != "0" and expert_parallel > 1:
        return
    _tell(trained, as_json=as_json)


def _tell(trained: Trained, *, as_json: bool) -> None:
    from mixtura.report import counted, human_count

    if as_json:
        typer.echo(json.dumps(trained.to_dict()))
        return
    loss = trained.last.get("loss")
    typer.echo(
        f"{human_count(trained.num_parameters)} parameters, {counted(trained.num_steps, 'step')}"
        + (f", last loss {loss:.4f}" if loss is not None else "")
        + f"; the model is in {trained.model}"
    )


def _handed_on(expert_parallel: int, directory: Path) -> bool:
    """Whether other processes did the work that this command was asked for."""
    import sys

    from mixtura.train.spread import check_size, run_processes, started

    if expert_parallel == 1:
        return False
    check_size(expert_parallel)
    if started() is not None:
        return False
    code = run_processes(expert_parallel, sys.argv[1:], directory)
    if code:
        raise typer.Exit(code)
    return True


def _say_lost(error: RuntimeError, expert_parallel: int, directory: Path) -> None:
    """End in one sentence, or silently where whoever started this process says it, if another one is gone."""
    from mixtura.errors import UnmetError
    from mixtura.train.spread import LOST, STARTED, lost_touch

    if expert_parallel == 1 or not lost_touch(error):
        return
    if STARTED in os.environ:
        raise typer.Exit(LOST)
    raise UnmetError(
        "another process does not answer any more; the same command goes on from the last checkpoint in "
        f"{directory}"
    )


def _starts(changes: list[str]) -> bool:
    """Whether a change says with which model the training begins, whose sizes need no file."""
    return any(change.partition("=")[0].strip() in ("start", "training.start") for change in changes)


def _read(
    config: Path | None, recipe: str | None, scale: str | None, changes: list[str]
) -> tuple[TrainConfig, str]:
    """The configuration that was asked for, and what the training is called."""
    if config is None and recipe is None and _starts(changes):
        from mixtura.train.config import build_config, changed

        if scale is not None:
            raise UserError("--scale is of a recipe; give --recipe NAME, or leave --scale out")
        read = build_config(changed({}, changes))
        return read, f"{Path(str(read.training.start)).name}-trained"
    if (config is None) == (recipe is None):
        raise UserError(
            "give a YAML file to train, or --recipe NAME; examples/train.yaml is a file to begin with"
        )
    if recipe is None:
        from mixtura.train.config import read_config

        if scale is not None:
            raise UserError("--scale is of a recipe; give --recipe NAME, or leave --scale out")
        assert config is not None
        return read_config(config, changes), config.stem
    from mixtura.running.memory.available import available_bytes
    from mixtura.train.recipes import read_recipe, require_memory

    asked = scale or "published"
    read = read_recipe(recipe, asked, changes)
    require_memory(read, available_bytes(), recipe)
    return read, f"{recipe}-{asked}"
