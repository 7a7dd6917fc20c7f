"""`mixtura doctor`: what this machine offers, and what holds a model back on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mixtura.running.doctor import Health


def doctor(
    model: str | None = typer.Argument(
        None, help="A directory or hub id to load and look into, too; nothing for the machine alone."
    ),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show versions, threads and rates of this machine and, of a model, the path each layer takes and why.

    A layer's tokens run, from the fastest: in a whole compiled step with all layers, in two compiled calls
    a layer, with compiled experts alone, or through PyTorch. Where it is not the first, the reason is said.

    Example: `mixtura doctor ./OLMoE-1B-7B`
    """
    from mixtura.running.doctor import examine
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    health = examine(max(resolved.path.glob("*.safetensors"), key=lambda file: file.stat().st_size))
    if as_json:
        typer.echo(json.dumps({"machine": health.to_dict()}))
    else:
        _print(health)


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
