"""`mixtura export`: write a model as another program reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.errors import SettingError

if TYPE_CHECKING:
    from mixtura.running.gguf import GgufExport

_FORMATS = ("gguf",)


def export(
    model: str | None = typer.Argument(
        None, help="Directory or hub id (name@revision); without it, the specimen.", show_default=False
    ),
    out: Path = typer.Option(..., help="The new file, such as model.gguf."),
    form: str = typer.Option(
        "gguf", "--format", help="gguf: one file for llama.cpp and what is built on it."
    ),
    types: list[str] = typer.Option(
        [],
        "--type",
        help="TYPE for all matrices, or TENSORS=TYPE for some; may be repeated, the last one counts. "
        "Types: bf16, q8_0, q6_k, q4_k, iq3_s and others; TENSORS: experts, shared, dense, attention, "
        "embedding, head, or a pattern such as 'blk.[0-3].ffn_down_exps'. Default: as they are.",
    ),
    text: Path | None = typer.Option(
        None,
        help="Text to weigh errors by: a file or directory of UTF-8 text or JSONL. Default: text that "
        "comes with mixtura.",
    ),
    calibrate: bool = typer.Option(
        True, help="Weigh errors by what text says of each matrix's inputs (llama.cpp's importance matrix)."
    ),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a model as a GGUF file for llama.cpp, with a type of its own for every layer and projection.

    Example: `mixtura export ./OLMoE-1B-7B --type q4_k --type 'blk.*.ffn_down_exps=q6_k' --out olmoe.gguf`
    """
    if form not in _FORMATS:
        raise SettingError(f"there is no format {form!r}; there are: {', '.join(_FORMATS)}")
    from mixtura.checkpoints.gguf.write import check_out
    from mixtura.running.gguf import GgufExport
    from mixtura.running.resolve import resolve_model

    check_out(out)
    resolved = resolve_model(model, assume_yes=yes)
    made = GgufExport(resolved.path, types, name=resolved.name.rsplit("/", 1)[-1], calibrate=calibrate)
    importance = None
    if made.calibrates:
        with _bar("reading calibration text", shown=not as_json) as move:
            importance = made.importance(text, report=move)
    with _bar(f"writing {out.name}", shown=not as_json) as move:
        done, total = 0, made.planned.num_bytes

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            move(done, total)

        made.write(out, importance, advance)
    _print(made, out, as_json)


def _print(made: GgufExport, out: Path, as_json: bool) -> None:
    """What was written."""
    from mixtura.checkpoints.gguf.write import gave_way_lines
    from mixtura.report.units import format_bytes

    planned = made.planned
    if as_json:
        facts = {
            "out": str(out),
            "architecture": planned.arch,
            "num_bytes": out.stat().st_size,
            "bytes_by_type": planned.types,
            "calibrated": made.calibrates,
            "other_types": list(gave_way_lines(planned)),
        }
        typer.echo(json.dumps(facts))
        return
    shares = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in planned.types.items())
    typer.echo(f"{out}: {format_bytes(out.stat().st_size)} for llama.cpp's {planned.arch} ({shares})")
    for line in gave_way_lines(planned):
        typer.echo(line)
    if not made.by_library and any(tensor.is_rounded for tensor in planned.tensors):
        typer.echo("rounded by the package gguf, without calibration; 'mixtura[llama]' would heed it")


@contextmanager
def _bar(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, which is told how much is done of how much."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mixtura.report.screen import screen

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen(stderr=True), disable=not shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
