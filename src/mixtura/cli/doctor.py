"""`mixtura doctor`: what this machine offers, and what holds a model back on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mixtura.kernels.paths import LayerPath
    from mixtura.running.doctor import Health


def doctor(
    model: str | None = typer.Argument(
        None, help="A directory or hub id to load and look into, too; nothing for the machine alone."
    ),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show versions, threads and rates of this machine and, of a model, the path each layer takes and why.

    The model is loaded and runs a few tokens. The paths, from the fastest: a whole step of all layers in one
    compiled call; both halves of a layer in two; one half; compiled experts alone; PyTorch.

    Example: `mixtura doctor ./OLMoE-1B-7B`
    """
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.kernels.paths import paths_of
    from mixtura.running.doctor import examine
    from mixtura.running.loading import load
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    health = examine(max(open_checkpoint(resolved.path).files, key=lambda file: file.stat().st_size))
    paths = [] if model is None else paths_of(load(resolved.path))
    if as_json:
        layers = {} if model is None else {"model": resolved.name, "layers": [asdict(path) for path in paths]}
        typer.echo(json.dumps({"machine": health.to_dict()} | layers))
        return
    _print(health)
    if model is not None:
        typer.echo(f"\n{resolved.name}")
        typer.echo("\n".join(path_lines(paths)))


def path_lines(paths: Sequence[LayerPath]) -> list[str]:
    """One line for layers that follow one another and take the same path for the same reason."""
    lines = []
    for (path, reason), run in groupby(paths, lambda one: (one.path, one.reason)):
        names = [one.layer for one in run]
        last = "" if len(names) == 1 else f" to {names[-1].rpartition('.')[2]}"
        lines.append(f"{names[0]}{last}: {path}" + (f", as {reason}" if reason else ""))
    return lines


def _print(health: Health) -> None:
    from mixtura.report.units import format_bytes

    quota = "no quota" if health.quota is None else f"a quota of {health.quota:g}"
    kernels = "PyTorch's alone" if health.why_missing else f"compiled, for {health.isas[-1]}"
    rows = {
        "versions": ", ".join(f"{name} {number}" for name, number in health.versions.items()),
        "processor": f"{health.processor}, {health.num_cores} cores, "
        f"{health.num_processors} for this process, {quota}",
        "threads": f"{health.num_threads} of the kernels, {health.torch_threads} of PyTorch",
        "kernels": kernels,
        "memory": f"{format_bytes(health.memory_num_bytes)}, {format_bytes(health.free_num_bytes)} free; "
        f"read at {health.read_bytes_per_s / 1e9:.1f} GB/s",
        "disk": f"{health.disk_bytes_per_s / 1e9:.2f} GB/s, reading {health.disk_file}",
    }
    for name, text in rows.items():
        typer.echo(f"{name:<11}{text}")
    for sentence in health.advice:
        typer.echo(f"! {sentence}")
