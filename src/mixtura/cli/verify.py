"""`mixtura verify`: whether a model says the same, to the bit, in less memory than its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._decoding import Asked, asked_for
from mixtura.cli._generating import Calibration, Changes, DecoderNames
from mixtura.cli._tiers import CACHE, PREFETCH, TRACE, check_words, wish_of

if TYPE_CHECKING:
    from mixtura.running.resolve import Resolved
    from mixtura.running.tiers.opening import Wish
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
    decoder: DecoderNames = "",
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    calibration: Calibration = None,
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Compare a model that runs from memory and disk with the same model in memory, logit by logit.

    They are the same to the bit, whatever the budget, the cache and the prefetcher; this shows it for a model
    and a machine. Exit code 1 if they are not. With a decoder that leaves experts out, such as online_pruning
    or modes, it says instead what that loses beside the model as it is, and what is read less.

    Examples: `mixtura verify ./OLMoE-1B-7B --memory 4GiB`

    `mixtura verify ./OLMoE-1B-7B --memory 4GiB --decoder modes --calibration modes.safetensors`
    """
    check_words(memory, cache, prefetch, trace)
    asked = asked_for(decoder, changes, None, calibration, [])
    from mixtura.running.memory.process import settle

    settle()
    from mixtura.running.resolve import resolve_model
    from mixtura.running.verifying import verify as verify_model

    resolved = resolve_model(model, assume_yes=yes)
    wish = wish_of(memory, cache, prefetch, trace, tokens + steps)
    assert wish is not None
    if asked is not None:
        _say_loss(resolved, wish, asked, tokens, as_json=as_json)
        return
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


def _say_loss(resolved: Resolved, wish: Wish, asked: Asked, tokens: int, *, as_json: bool) -> None:
    from mixtura.report.units import format_bytes
    from mixtura.running.losing import measure_loss

    found = measure_loss(
        resolved.path,
        wish,
        asked.decoders,
        calibrations=[] if asked.calibration is None else [str(asked.calibration)],
        num_tokens=tokens,
        say=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps({"model": resolved.name, **asdict(found)}))
        return
    before, after = (format_bytes(int(one)) for one in found.read_bytes)
    typer.echo(
        f"{found.divergence:.4g} nats a token are lost (largest {found.largest_divergence:.3g}), and "
        f"{found.same_choice:.1%} of {found.num_tokens} likeliest tokens are the same; the text has "
        f"{found.nats[1]:.4f} nats a token instead of {found.nats[0]:.4f}\n"
        f"{found.left_out:.1%} of experts are left out: {after} are read from disk for a token instead of "
        f"{before}"
    )


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
