"""`mixtura doctor`: what this machine offers, and what holds a model back on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from mixtura.errors import SettingError

if TYPE_CHECKING:
    from mixtura.kernels.paths import LayerPath
    from mixtura.running.doctor import Health


def doctor(
    model: str | None = typer.Argument(
        None, help="A directory or hub id to load and look into, too; nothing for the machine alone."
    ),
    memory: str | None = typer.Option(
        None, help="Predict how the model runs in so much memory, such as 8GiB, and try it."
    ),
    disk: str | None = typer.Option(
        None, help="With --memory: bytes in a second of another machine's disk, such as 3GB."
    ),
    ram: str | None = typer.Option(
        None, help="With --memory: bytes in a second of another machine's memory, such as 50GB."
    ),
    context: int = typer.Option(4096, min=1, help="With --memory: tokens of prompt and answer together."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show versions, threads and rates of this machine and, of a model, the path each layer takes and why.

    The model is loaded and runs a few tokens. The paths, from the fastest: a whole step of all layers in one
    compiled call; both halves of a layer in two; one half; compiled experts alone; PyTorch.

    With --memory, a forecast instead: the choices that the model makes on text are run through the cache that
    it would have, at the rates of disk and memory that are measured or given; then some tokens are run for
    real, unless the rates are another machine's.

    Example: `mixtura doctor ./OLMoE-1B-7B --memory 6GiB`
    """
    if memory is None and (disk, ram) != (None, None):
        raise SettingError("--disk and --ram are for a forecast; give --memory, too, such as --memory 8GiB")
    if memory is not None:
        _forecast(model, memory, disk, ram, context, yes=yes, as_json=as_json)
        return
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


def _forecast(
    model: str | None,
    memory: str,
    disk: str | None,
    ram: str | None,
    context: int,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    from mixtura.report.units import format_bytes, parse_bytes
    from mixtura.running.resolve import resolve_model
    from mixtura.running.tiers.cost import forecast
    from mixtura.running.tiers.opening import Wish

    for size in (memory, disk, ram):
        if size is not None:
            parse_bytes(size)
    resolved = resolve_model(model, assume_yes=yes)
    wish = Wish(memory=memory, context=context)
    found = forecast(resolved.path, wish, disk=disk, ram=ram, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps({"model": resolved.name} | found.to_dict()))
        return
    limit = f"{found.disk_limit:.1f} by the disk, " if found.disk_limit else ""
    rows = {
        "room": f"{found.num_slots} of {found.num_experts} experts in {memory}",
        "rates": f"{found.disk_bytes_per_s / 1e9:.2f} GB/s of disk, "
        f"{found.memory_bytes_per_s / 1e9:.1f} GB/s of memory",
        "hits": f"{found.hit_rate:.1%} of needed experts in memory, {found.chance:.1%} by chance; "
        f"{format_bytes(found.missed_bytes_per_token)} a token from disk",
        "predicted": f"{found.tokens_per_second:.1f} tokens/s, p99 {found.p99_ms:.0f} ms; limits: {limit}"
        f"{found.memory_limit:.1f} by memory",
    }
    if found.measured_tokens_per_second is not None and found.measured_hit_rate is not None:
        rows["measured"] = (
            f"{found.measured_tokens_per_second:.1f} tokens/s, {found.measured_hit_rate:.1%} in memory; "
            f"for these tokens {found.compared_tokens_per_second:.1f} and {found.compared_hit_rate:.1%} "
            "were predicted"
        )
    for name, text in rows.items():
        typer.echo(f"{name:<11}{text}")
    typer.echo(found.verdict)


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
