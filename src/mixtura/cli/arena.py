"""`mixtura arena`: every method of a kind at the same task, compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from mixtura.cli._arenas import ARENAS, About, Asked, Cards, Table
from mixtura.cli._places import check_folder
from mixtura.errors import SettingError, UnknownNameError


def arena(
    kind: str = typer.Argument(help=f"{', '.join([*ARENAS][:-1])} or {[*ARENAS][-1]}."),
    only: str = typer.Option("", help="Names with commas between; the baselines always take part."),
    seeds: int = typer.Option(
        3, min=1, help="Trainings of each method; where nothing is trained, texts or splits."
    ),
    tokens: int | None = typer.Option(
        None,
        min=1,
        help="Tokens of each training (400,000), that pruners observe or quantizers calibrate on (16,384), "
        "or of texts that are replayed (2,048).",
    ),
    model: Path | None = typer.Option(
        None,
        help="YAML file of sizes (hidden_size, num_experts, ...) in place of the small model's; where "
        "nothing is trained, the directory of a checkpoint in place of the specimen.",
    ),
    out: Path = typer.Option(Path("arena"), help="Directory of the page, the table and the picture."),
    runs: Path = typer.Option(Path("build/arena"), help="Directory of the results of single runs."),
    table: Table = None,
    cards: Cards = None,
    about: About = "",
    threads: int | None = typer.Option(None, min=1, help="CPU threads to work with."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list of objects."),
) -> None:
    """Train the same small model with every method of a kind, on the same text, and compare.

    Of decoders: a model answers the same questions by each. Of pruners: keep three quarters, a half and a
    quarter of a model's experts by every criterion, and measure what is left; of mergers the same,
    experts being averaged. Of quantizers: store a model's experts by each in the same bytes. Of caches:
    replay what a model chose on text, with room for some of its experts; of prefetchers the same, timed
    at stated rates of disk and memory. Of model_routers: learn from half of a table of answers, and route
    the other half; of aggregators: replay cascades and votes on such a table. Of estimators: learn small
    problems beside plain models. Of adapters: tune the specimen on tasks that it fails, all at one size;
    of upcyclers: make MoE models of small dense ones, and train all on.
    Runs that are done are kept: the same command goes on where it was stopped.

    Example: `mixtura arena routers --only top_p,expert_choice --seeds 3`
    """
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    if only and not names:
        raise SettingError(f"--only takes names with commas between, got {only!r}")
    check_folder(out)
    check_folder(runs)
    if kind not in ARENAS:
        raise UnknownNameError("kind in the arena", kind, ARENAS)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    asked = Asked(
        kind=kind, names=names, seeds=seeds, tokens=tokens, model=model, out=out, runs=runs,
        table=table, cards=cards, about=about,
    )  # fmt: skip
    try:
        standings = ARENAS[kind].hold(asked)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from the runs in {runs}", err=True)
        raise
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in standings], indent=1))
        return
    ARENAS[kind].show(standings)
    typer.echo(f"the page is {out / kind}.md", err=True)
