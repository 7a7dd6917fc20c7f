"""`mixtura condense`: a Mixture-of-Experts model back into a dense one."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# Before PyTorch is first used: the model is streamed through little memory.
_MMAP_BYTES = 1 << 20

Model = Annotated[str, typer.Argument(help="An MoE model without shared experts: a directory or a hub id.")]
Out = Annotated[Path, typer.Option(help="The new directory.")]


class Shares(StrEnum):
    """What weighs experts in the average."""

    EVEN = "even"
    LOAD = "load"


Weights = Annotated[
    Shares,
    typer.Option("--shares", help="Weigh experts alike (even) or by how often text reaches them (load)."),
]
Text = Annotated[
    Path | None,
    typer.Option(help="With --shares load or --heads: text. Default: text that comes with mixtura."),
]
HeadsKept = Annotated[
    int | None,
    typer.Option(
        help="Of a model with the attention expert_heads: leave so many heads, experts as they are."
    ),
]


def condense(
    model: Model,
    *,
    out: Out,
    shares: Weights = Shares.EVEN,
    text: Text = None,
    heads: HeadsKept = None,
    tokens: int = typer.Option(8192, min=1, help="Tokens of the text for --shares load or --heads."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Average each layer's experts into one feed-forward part: a dense model that needs no router.

    For models whose experts began as copies of one part (`mixtura upcycle`) and were trained from there. What
    stands outside the experts stays as it is. With `--heads`, heads that are experts go instead, all but
    those of each layer that most tokens of the text choose.

    Example: `mixtura condense ./tuned-moe --shares load --out dense-again`
    """
    from mixtura.running.memory.process import settle

    settle(_MMAP_BYTES)
    from mixtura.checkpoints.upcycling.back import condense as write
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    if heads is not None:
        _heads(resolved.path, out, heads, tokens, text, as_json=as_json)
        return
    weights = _by_load(resolved.path, text, tokens) if shares is Shares.LOAD else None
    written = write(resolved.path, out, shares=weights, progress=not as_json)
    if as_json:
        typer.echo(json.dumps({"model": str(written), "source": resolved.name, "shares": shares.value}))
    else:
        typer.echo(f"the experts of {resolved.name} are averaged ({shares.value}); the model is in {written}")


def _heads(path: Path, out: Path, heads: int, tokens: int, text: Path | None, *, as_json: bool) -> None:
    """Leave some heads of each layer, and say which."""
    from mixtura.running.heads import condense_heads

    kept = condense_heads(path, out, heads, tokens, text)
    if as_json:
        typer.echo(json.dumps({"model": str(out), "source": str(path), "heads": kept}))
        return
    told = "; ".join(f"layer {layer}: {', '.join(map(str, own))}" for layer, own in enumerate(kept))
    typer.echo(f"heads that stay, of {path}: {told}; the model is in {out}")


def _by_load(path: Path, text: Path | None, tokens: int) -> dict[int, list[float]]:
    """Each expert's share of the assignments of its layer."""
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.running.observing.checkpoint import observe_checkpoint, read_text

    view = open_checkpoint(path)
    trace = observe_checkpoint(view, read_text(view, text, max_tokens=tokens, max_length=512))
    loads = {layer.index: layer.load.double() for layer in trace.layers}
    return {index: (load / load.sum()).tolist() for index, load in loads.items()}
