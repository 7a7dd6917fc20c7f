"""`mixtura factor`: latent experts for a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Mixtral, Qwen3-MoE, OLMoE or one of mixtura's own: a directory or a hub id.")
]
Out = Annotated[Path, typer.Option(help="The new directory.")]
Width = Annotated[int, typer.Option(min=1, help="Latent features that the experts of a group read.")]
Groups = Annotated[int, typer.Option(min=1, help="Groups of adjacent experts, each with a space of its own.")]
Text = Annotated[Path | None, typer.Option(help="Text to compare on. Default: what comes with mixtura.")]


def factor(
    model: Model,
    *,
    out: Out,
    width: Width,
    groups: Groups = 1,
    text: Text = None,
    tokens: int = typer.Option(4096, min=2, help="Tokens of the text to compare on."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Let a model's experts read tokens through a narrow space that they share: fewer weights, some loss.

    Of all such spaces those that lose least of the weights are taken; nothing is trained. The result is a
    model of mixtura's own with the experts `latent`, which transformers loads after `import mixtura`.

    Example: `mixtura factor ./OLMoE-1B-7B --width 1024 --groups 8 --out OLMoE-latent`
    """
    from mixtura.fitting.factoring import factor as make
    from mixtura.report.units import format_bytes
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    made = make(resolved.path, out, width=width, num_groups=groups, text=text, max_tokens=tokens)
    if as_json:
        typer.echo(json.dumps(made.to_dict()))
        return
    lost = ", ".join(f"{share:.1%}" for share in made.lost)
    typer.echo(
        f"{format_bytes(made.num_bytes_before)} of weights are {format_bytes(made.num_bytes)} now; KL to the "
        f"model as it was {made.kl:.4g} nats a token, the same next token in {made.same_top:.1%} of "
        f"{made.num_tokens:,}; of what reads tokens layers lost {lost}; the model is in {made.model}"
    )
