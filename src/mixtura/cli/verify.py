"""`mixtura verify`: whether a model says the same, to the bit, in less memory than its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._tiers import CACHE, PREFETCH, TRACE, check_words, wish_of

if TYPE_CHECKING:
    from mixtura.running.verifying import Verified


def verify(
    model: str | None = typer.Argument(
        None, help="Directory or hub id; without it, the specimen.", show_default=False
    ),
    memory: str = typer.Option(..., help="Memory the whole process may take, such as 8GiB."),
    cache: str = CACHE,
    prefetch: str = PREFETCH,
    trace: Path | None = TRACE,
    bits: int | None = typer.Option(
        None, help="Read experts that were stored with the quantizer nested at 8, 4 or 2 bits."
    ),
    tokens: int = typer.Option(256, min=8, help="Tokens of the longest prompt that is tried."),
    steps: int = typer.Option(16, min=1, help="New tokens after each prompt."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Compare a model that runs from memory and disk with the same model in memory, logit by logit.

    They are the same to the bit, whatever the budget, the cache and the prefetcher; this shows it for a model
    and a machine. Exit code 1 if they are not.

    Example: `mixtura verify ./OLMoE-1B-7B --memory 4GiB`
    """
    check_words(memory, cache, prefetch, trace)
    from mixtura.running.memory.process import settle

    settle()
    from mixtura.running.resolve import resolve_model
    from mixtura.running.verifying import verify as verify_model

    resolved = resolve_model(model, assume_yes=yes)
    wish = wish_of(memory, cache, prefetch, trace, tokens + steps)
    assert wish is not None
    found = verify_model(
        resolved.path,
        wish,
        num_tokens=tokens,
        num_steps=steps,
        bits=bits,
        say=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps({"model": resolved.name, **asdict(found)}))
    else:
        typer.echo(_sentence(found))
    if not found.is_equal:
        raise typer.Exit(1)


def _sentence(found: Verified) -> str:
    from mixtura.report.units import format_bytes

    read = format_bytes(found.experts.get("demanded_bytes", 0) + found.experts.get("prefetched_bytes", 0))
    if found.is_equal:
        return (
            f"the same to the bit: {found.num_logits} logits of {found.num_passes} passes, with "
            f"{found.experts.get('hit_rate', 0):.1%} of experts in memory and {read} read from disk"
        )
    return (
        f"not the same: {found.first_difference} is the first of {found.num_passes} passes to differ, and "
        f"logits differ by {found.largest_difference:.3g} at most; this is a fault of mixtura: report it"
    )
