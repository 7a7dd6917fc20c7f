"""`mixtura inspect`: what is in a model, from the headers of its files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mixtura.checkpoints.summary import LayerSummary, ModelSummary


def inspect(
    model: str | None = typer.Argument(
        None, help="A directory, a hub id (owner/name, owner/name@revision), or nothing for the specimen."
    ),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show what is in a model: family, layers, experts, router, parameters, bytes, what a token reads.

    Only the headers of its files are read, whatever its size.

    Example: `mixtura inspect ./OLMoE-1B-7B --json`
    """
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.checkpoints.summary import summarize
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    summary = summarize(open_checkpoint(resolved.path))
    if as_json:
        typer.echo(json.dumps({"model": resolved.name, **summary.to_dict()}))
    else:
        _print(resolved.name, summary)


def _print(name: str, summary: ModelSummary) -> None:
    from mixtura.report import counted, human_count, human_percent
    from mixtura.report.screen import screen, show_table
    from mixtura.report.units import format_bytes

    console = screen()
    console.print(name, style="bold")
    read = summary.bytes_per_token
    rows = {
        "family": summary.family,
        "layers": f"{summary.num_layers}, {len(summary.layers)} of them with experts",
        "parameters": f"{human_count(summary.num_parameters)}, "
        f"{human_count(summary.active_parameters)} active",
        "weights": f"{format_bytes(summary.num_bytes)} in {counted(summary.num_files, 'file')}",
        "experts": f"{format_bytes(summary.expert_num_bytes)}, "
        f"{human_percent(summary.expert_num_bytes / summary.num_bytes)} of the weights",
        "a token reads": f"{format_bytes(read)}, {human_percent(read / summary.num_bytes)} of the weights",
        "stored as": ", ".join(f"{kind} {format_bytes(size)}" for kind, size in summary.stored_as.items()),
    }
    if summary.unused_num_bytes:
        rows["not used"] = f"{format_bytes(summary.unused_num_bytes)} that transformers leaves out"
    if summary.adapter is not None:
        rows["adapter"] = f"{summary.adapter}, beside the weights and in none of these numbers"
    show_table(console, [], [list(row) for row in rows.items()], left=(0, 1))
    console.print()
    headers = ["layers", "experts", "chosen", "groups", "router", "shared", "width", "one expert"]
    cells = [_cells(run) for run in _runs(summary.layers)]
    show_table(console, headers, cells, title="MoE layers", left=(0, headers.index("router")))


def _runs(layers: tuple[LayerSummary, ...]) -> list[list[LayerSummary]]:
    """Consecutive layers that differ in nothing but their number."""
    from dataclasses import replace

    runs: list[list[LayerSummary]] = []
    for layer in layers:
        if runs and replace(runs[-1][-1], index=layer.index) == layer:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _cells(run: list[LayerSummary]) -> list[str]:
    from mixtura.report.units import format_bytes

    layer = run[0]
    limited = layer.num_groups > 1
    return [
        f"{layer.index}" if len(run) == 1 else f"{layer.index} to {run[-1].index}",
        f"{layer.num_experts}",
        f"{layer.top_k}",
        f"{layer.top_groups} of {layer.num_groups}" if limited else "–",
        f"{layer.router}, bias for the choice" if layer.has_correction_bias else layer.router,
        "yes" if layer.has_shared_experts else "no",
        f"{layer.d_model} × {layer.d_expert}",
        format_bytes(layer.expert_num_bytes),
    ]
