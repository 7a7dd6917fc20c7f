"""`mixtura split`: finer experts for a trained model, which compute what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Mixtral, Qwen3-MoE or OLMoE: a directory or a hub id.")]
Out = Annotated[Path, typer.Option(help="The new directory.")]
Parts = Annotated[int, typer.Option(min=2, help="Into how many narrower experts each is cut.")]


def split(
    model: Model,
    *,
    out: Out,
    parts: Parts = 2,
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Cut each expert into narrower ones, of which a token takes as many more, so that nothing changes.

    The result is an ordinary model of the same family, which computes what it did; trained further its finer
    experts can come apart.

    Example: `mixtura split ./OLMoE-1B-7B --parts 2 --out OLMoE-finer`
    """
    from mixtura.fitting.splitting import split_experts
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    made = split_experts(resolved.path, out, parts=parts)
    if as_json:
        typer.echo(json.dumps(made.to_dict()))
        return
    typer.echo(
        f"{made.num_experts} experts of width {made.d_expert} a layer, {made.top_k} a token; KL to the model "
        f"as it was {made.kl:.2g} nats a token ({made.num_tokens:,} tokens); the model is in {made.model}"
    )
