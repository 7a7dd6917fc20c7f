"""`mixtura arena`: train one small model with every method of a kind, or shrink one by every method."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._places import check_folder
from mixtura.errors import SettingError, UnknownNameError, UserError

if TYPE_CHECKING:
    from mixtura.fitting.arena.standings import Standing as Pruned
    from mixtura.running.decoders.arena.run import Standing as Answered
    from mixtura.train.arena.standings import Standing

_SHRINKING = ("pruners", "mergers")
_DECODERS = "decoders"


def arena(
    kind: str = typer.Argument(help="routers, balancers, mixers, pruners, mergers or decoders."),
    only: str = typer.Option("", help="Names with commas between; the baselines always take part."),
    seeds: int = typer.Option(3, min=1, help="Trainings of each method; of pruners, texts to prune by."),
    tokens: int | None = typer.Option(
        None, min=1, help="Tokens of each training (400,000), or that pruners observe (24,576)."
    ),
    model: Path | None = typer.Option(
        None,
        help="YAML file of sizes (hidden_size, num_experts, ...) in place of the small model's; of pruners, "
        "the directory of a checkpoint in place of the specimen.",
    ),
    out: Path = typer.Option(Path("arena"), help="Directory of the page, the table and the picture."),
    runs: Path = typer.Option(Path("build/arena"), help="Directory of the results of single runs."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads to work with."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list of objects."),
) -> None:
    """Train the same small model with every method of a kind, on the same text, and compare.

    Of decoders: a model answers the same questions by each. Of pruners: keep three quarters, a half and a
    quarter of a model's experts by every criterion, and measure what is left; of mergers the same, experts
    being averaged. Runs that are done are kept: the same command goes on where it was stopped.

    Example: `mixtura arena routers --only top_p,expert_choice --seeds 3`
    """
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    if only and not names:
        raise SettingError(f"--only takes names with commas between, got {only!r}")
    check_folder(out)
    check_folder(runs)
    from mixtura.train.arena.entries import KINDS

    if kind not in (*KINDS, *_SHRINKING, _DECODERS):
        raise UnknownNameError("kind in the arena", kind, (*KINDS, *_SHRINKING, _DECODERS))
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    shared = {"only": names, "num_seeds": seeds, "runs": runs, "out": out}
    if tokens is not None:
        if kind == _DECODERS:
            raise SettingError("--tokens is for trainings and pruners; decoders answer whole questions")
        shared["num_tokens"] = tokens
    try:
        table = _held(kind, model, shared)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from the runs in {runs}", err=True)
        raise
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in table], indent=1))
        return
    _printer(kind)(table)
    typer.echo(f"the page is {out / kind}.md", err=True)


def _held(kind: str, model: Path | None, shared: dict[str, Any]) -> list[Any]:
    if kind in _SHRINKING:
        return _shrink(kind, model, shared)
    return _answer(model, shared) if kind == _DECODERS else _train(kind, model, shared)


def _printer(kind: str) -> Callable[[list[Any]], None]:
    if kind == _DECODERS:
        return _print_answered
    return _print_pruned if kind in _SHRINKING else _print


def _answer(model: Path | None, shared: dict[str, Any]) -> list[Answered]:
    from mixtura.running.decoders.arena.run import Contest, hold

    if model is not None and not model.is_dir():
        raise UserError(f"--model of the arena of decoders takes the directory of a checkpoint, got {model}")
    return hold(Contest(model=model, **shared), _notify)


def _train(kind: str, model: Path | None, shared: dict[str, Any]) -> list[Standing]:
    from mixtura.train.arena.run import Contest, hold
    from mixtura.train.arena.scale import Scale

    scale = Scale.read(model) if model else Scale()
    return hold(Contest(kind=kind, scale=scale, **shared), _notify)


def _shrink(kind: str, model: Path | None, shared: dict[str, Any]) -> list[Pruned]:
    from mixtura.fitting.arena.run import Contest, hold

    if model is not None and not model.is_dir():
        raise UserError(f"--model of the arena of {kind} takes the directory of a checkpoint, got {model}")
    return hold(Contest(kind=kind, model=model, **shared), _notify)


def _notify(line: str) -> None:
    typer.echo(line, err=True)


def _print(table: Iterable[Standing]) -> None:
    from mixtura.report.screen import screen, show_table

    rows = []
    for one in table:
        bits = one.values.get("bits_per_byte")
        shown = "not trained" if bits is None else f"{bits:.4f}"
        said = one.error if bits is None else one.verdict
        rows.append([one.name, shown, said + ("  (leaking)" if one.leaks else "")])
    show_table(screen(), ["name", "bits per byte", "verdict"], rows, left=(0, 2))


def _print_pruned(table: Iterable[Pruned]) -> None:
    from mixtura.report.screen import screen, show_table

    rows = [
        [f"{one.keep:.0%}", one.name, f"{one.values['kl']:.4f}", f"{one.ratio:.2f}", one.verdict]
        for one in table
    ]
    heads = ["experts", "name", "KL", "to frequency", "verdict"]
    show_table(screen(), heads, rows, left=(1, 4))


def _print_answered(table: Iterable[Answered]) -> None:
    from mixtura.report.screen import screen, show_table

    rows = [
        [one.name, f"{one.accuracy:.1%}", f"{one.gained}, {one.lost}", f"{one.tokens:.0f}", one.verdict]
        for one in table
    ]
    show_table(screen(), ["name", "right", "gained, lost", "tokens run", "verdict"], rows, left=(0, 4))
