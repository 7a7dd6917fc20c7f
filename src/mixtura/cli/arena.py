"""`mixtura arena`: train the same small model with every method of a kind and compare."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._places import check_folder
from mixtura.errors import SettingError

if TYPE_CHECKING:
    from mixtura.train.arena.standings import Standing


def arena(
    kind: str = typer.Argument(help="routers, balancers or mixers."),
    only: str = typer.Option("", help="Names with commas between; top_k always takes part."),
    seeds: int = typer.Option(3, min=1, help="Trainings of each method."),
    tokens: int = typer.Option(400_000, min=1, help="Tokens of each training."),
    model: Path | None = typer.Option(
        None, help="YAML file of sizes (hidden_size, num_experts, ...) in place of the small model's."
    ),
    out: Path = typer.Option(Path("arena"), help="Directory of the page, the table and the picture."),
    runs: Path = typer.Option(Path("build/arena"), help="Directory of the results of single runs."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads to train with."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list of objects."),
) -> None:
    """Train the same small model with every method of a kind, on the same text, and compare.

    Runs that are done are kept: the same command goes on where it was stopped.

    Example: `mixtura arena routers --only top_p,expert_choice --seeds 3`
    """
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    if only and not names:
        raise SettingError(f"--only takes names with commas between, got {only!r}")
    check_folder(out)
    check_folder(runs)
    import torch

    from mixtura.train.arena.run import Contest, hold
    from mixtura.train.arena.scale import Scale

    if threads is not None:
        torch.set_num_threads(threads)
    contest = Contest(
        kind=kind,
        only=names,
        num_seeds=seeds,
        num_tokens=tokens,
        scale=Scale.read(model) if model else Scale(),
        runs=runs,
        out=out,
    )
    try:
        table = hold(contest, lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from the runs in {runs}", err=True)
        raise
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in table], indent=1))
        return
    _print(table)
    typer.echo(f"the page is {out / kind}.md", err=True)


def _print(table: Iterable[Standing]) -> None:
    from mixtura.report.screen import screen, show_table

    rows = []
    for one in table:
        bits = one.values.get("bits_per_byte")
        shown = "not trained" if bits is None else f"{bits:.4f}"
        said = one.error if bits is None else one.verdict
        rows.append([one.name, shown, said + ("  (leaking)" if one.leaks else "")])
    show_table(screen(), ["name", "bits per byte", "verdict"], rows, left=(0, 2))
