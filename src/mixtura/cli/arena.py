"""`mixtura arena`: every method of a kind at the same task: training, pruning, keeping experts in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._places import check_folder
from mixtura.errors import SettingError, UnknownNameError, UserError

if TYPE_CHECKING:
    from mixtura.fitting.arena.standings import Standing as Pruned
    from mixtura.train.arena.standings import Standing

_PRUNERS, _CACHES = "pruners", "caches"
_REPLAYED_TOKENS = 2048


def arena(
    kind: str = typer.Argument(help="routers, balancers, mixers, pruners or caches."),
    only: str = typer.Option("", help="Names with commas between; the baselines always take part."),
    seeds: int = typer.Option(3, min=1, help="Trainings of each method; of pruners and caches, texts."),
    tokens: int | None = typer.Option(
        None,
        min=1,
        help="Tokens of each training (400,000), that pruners observe (24,576), or of caches' texts (2,048).",
    ),
    model: Path | None = typer.Option(
        None,
        help="YAML file of sizes (hidden_size, num_experts, ...) in place of the small model's; of pruners "
        "and caches, the directory of a checkpoint in place of the specimen.",
    ),
    out: Path = typer.Option(Path("arena"), help="Directory of the page, the table and the picture."),
    runs: Path = typer.Option(Path("build/arena"), help="Directory of the results of single runs."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads to work with."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list of objects."),
) -> None:
    """Train the same small model with every method of a kind, on the same text, and compare.

    Of pruners: keep three quarters, a half and a quarter of a model's experts by every criterion, and
    measure what is left. Of caches: replay what a model chose on text, with room for some of its experts.
    Runs that are done are kept: the same command goes on where it was stopped.

    Example: `mixtura arena routers --only top_p,expert_choice --seeds 3`
    """
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    if only and not names:
        raise SettingError(f"--only takes names with commas between, got {only!r}")
    check_folder(out)
    check_folder(runs)
    from mixtura.train.arena.entries import KINDS

    if kind not in (*KINDS, _PRUNERS, _CACHES):
        raise UnknownNameError("kind in the arena", kind, (*KINDS, _PRUNERS, _CACHES))
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if kind == _CACHES:
        _replay(model, names, (seeds, tokens or _REPLAYED_TOKENS), out, as_json)
        return
    shared = {"only": names, "num_seeds": seeds, "runs": runs, "out": out}
    if tokens is not None:
        shared["num_tokens"] = tokens
    try:
        table: list[Any] = _prune(model, shared) if kind == _PRUNERS else _train(kind, model, shared)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from the runs in {runs}", err=True)
        raise
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in table], indent=1))
        return
    _print_pruned(table) if kind == _PRUNERS else _print(table)
    typer.echo(f"the page is {out / kind}.md", err=True)


def _train(kind: str, model: Path | None, shared: dict[str, Any]) -> list[Standing]:
    from mixtura.train.arena.run import Contest, hold
    from mixtura.train.arena.scale import Scale

    scale = Scale.read(model) if model else Scale()
    return hold(Contest(kind=kind, scale=scale, **shared), _notify)


def _prune(model: Path | None, shared: dict[str, Any]) -> list[Pruned]:
    from mixtura.fitting.arena.run import Contest, hold

    if model is not None and not model.is_dir():
        raise UserError(f"--model of the arena of pruners takes the directory of a checkpoint, got {model}")
    return hold(Contest(model=model, **shared), _notify)


def _replay(
    model: Path | None, names: tuple[str, ...], texts: tuple[int, int], out: Path, as_json: bool
) -> None:
    """Replay recorded choices through caches, write the page and print the table."""
    from mixtura import specimen
    from mixtura.report.screen import screen, show_table
    from mixtura.report.units import format_bytes
    from mixtura.running.tiers.arena import hold
    from mixtura.running.tiers.page import as_csv, markdown

    if model is not None and not model.is_dir():
        raise UserError(f"--model of the arena of caches takes the directory of a checkpoint, got {model}")
    table = hold(model or specimen.path(), names, *texts, _notify)
    out.mkdir(parents=True, exist_ok=True)
    page = markdown(table, "the specimen" if model is None else model.name, *texts)
    (out / f"{_CACHES}.md").write_text(page, encoding="utf-8")
    (out / f"{_CACHES}.csv").write_text(as_csv(table), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in table], indent=1))
        return
    rows = []
    for one in table:
        rate, read, over = (sum(v) / len(v) for v in (one.hit_rates, one.missed_bytes, one.over_bound))
        rows.append([f"{one.share:.0%}", one.name, f"{rate:.1%}", format_bytes(read), f"{over:.2f}"])
    heads = ["room", "name", "hit rate", "read a token", "misses to belady"]
    show_table(screen(), heads, rows, left=(1,))
    typer.echo(f"the page is {out / _CACHES}.md", err=True)


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
