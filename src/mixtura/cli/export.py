"""`mixtura export`: write a model as another program reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._going_on import told_how_to_go_on
from mixtura.errors import SettingError, suggest

if TYPE_CHECKING:
    from mixtura.running.gguf import GgufExport

_FORMATS = ("gguf", "compressed-tensors")
_OUT = "The new file, such as model.gguf, or the new directory of --format compressed-tensors."
_FORM = (
    "gguf: one file for llama.cpp and what is built on it. compressed-tensors: a directory for "
    "transformers and vLLM."
)
_TYPES = (
    "TYPE for all matrices of a GGUF file, or TENSORS=TYPE for some; may be repeated, the last one counts. "
    "Types: bf16, q8_0, q6_k, q4_k, iq3_s and others; TENSORS: experts, shared, dense, attention, embedding, "
    "head, or a pattern such as 'blk.[0-3].ffn_down_exps'. Default: as they are."
)
_TEXT = (
    "Text to weigh errors by: a file or directory of UTF-8 text or JSONL. Default: text that comes with "
    "mixtura."
)
_CALIBRATE = "Weigh errors by what text says of each matrix's inputs (llama.cpp's importance matrix)."
_BITS = (
    "For compressed-tensors: round routed experts to so many bits, 2 to 8, and measure what that loses. "
    "Without it they must be stored as such integers already."
)
_GROUP = "For --bits: neighbouring weights that share a scale; 0 is a whole row."


def export(
    model: str | None = typer.Argument(
        None, help="Directory or hub id (name@revision); without it, the specimen.", show_default=False
    ),
    out: Path = typer.Option(..., help=_OUT),
    form: str = typer.Option("gguf", "--format", help=_FORM),
    types: list[str] = typer.Option([], "--type", help=_TYPES),
    text: Path | None = typer.Option(None, help=_TEXT),
    calibrate: bool = typer.Option(True, help=_CALIBRATE),
    bits: int | None = typer.Option(None, help=_BITS),
    group_size: int = typer.Option(128, min=0, help=_GROUP),
    measure: bool = typer.Option(True, help="Measure what --bits loses on held-out text."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a model as another program reads it: a GGUF file for llama.cpp, with a type of its own for every
    layer and projection, or a compressed-tensors directory for transformers and vLLM.

    Example: `mixtura export ./OLMoE-1B-7B --type q4_k --type 'blk.*.ffn_down_exps=q6_k' --out olmoe.gguf`
    """
    if form not in _FORMATS:
        raise SettingError(f"there is no format {form!r}; {suggest(form, _FORMATS)}")
    if form == "compressed-tensors":
        if types or not calibrate:
            raise SettingError("--type and --no-calibrate are for GGUF files; leave them out, or give --bits")
        rounding = {"bits": bits, "group_size": group_size, "text": text, "measure": measure}
        _compressed_tensors(model, out, rounding, yes=yes, as_json=as_json)
        return
    if bits is not None:
        raise SettingError("--bits is for --format compressed-tensors; GGUF files take types, as --type q4_k")
    _gguf(model, out, types, text if calibrate else None, calibrate, yes=yes, as_json=as_json)


def _gguf(
    model: str | None,
    out: Path,
    types: list[str],
    text: Path | None,
    calibrate: bool,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    """Write a file for llama.cpp, and say what it is."""
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


def _compressed_tensors(
    model: str | None, out: Path, rounding: dict[str, Any], *, yes: bool, as_json: bool
) -> None:
    """Write a directory for transformers and vLLM, and say what it is."""
    from mixtura.fitting.compressing.ordinary import export_compressed_tensors
    from mixtura.fitting.printing import narrated
    from mixtura.fitting.publishing import beside
    from mixtura.report.units import format_bytes
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    with told_how_to_go_on(beside(out)), narrated() as notify:
        made = export_compressed_tensors(resolved.path, out, **rounding, name=resolved.name, notify=notify)
    if as_json:
        typer.echo(json.dumps(made.to_dict()))
        return
    sizes = f"{format_bytes(made.bytes_after)} of {format_bytes(made.bytes_before)}"
    typer.echo(f"{out}: {sizes}, experts in {made.bits} bits, for transformers and vLLM")
    if made.quality is not None:
        kl = f"{made.quality.kl:.4g} ({made.quality.kl_low:.3g} to {made.quality.kl_high:.3g})"
        typer.echo(
            f"KL to what it was made from: {kl} nats a token on {made.quality.num_tokens} held-out tokens"
        )
    for note in made.notes:
        typer.echo(f"note: {note}")


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
