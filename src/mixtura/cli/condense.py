"""`mixtura condense`: a Mixture-of-Experts model back into a dense one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mixtura.errors import SettingError

# Before PyTorch is first used: the model is streamed through little memory.
_MMAP_BYTES = 1 << 20

Model = Annotated[str, typer.Argument(help="An MoE model without shared experts: a directory or a hub id.")]
Out = Annotated[Path, typer.Option(help="The new directory.")]


class Shares(StrEnum):
    """What weighs experts in the average."""

    EVEN = "even"
    LOAD = "load"
    LEARNED = "learned"


Weights = Annotated[
    Shares,
    typer.Option(
        "--shares",
        help="Weigh experts alike (even), by how often text reaches them (load), or learn the weights with "
        "which text is predicted best (learned).",
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        help="With --shares load or learned, or --heads: text. Default: text that comes with mixtura."
    ),
]
First = Annotated[
    float | None,
    typer.Option(help="With --shares learned: the share of expert 0, which is then not learned (XFT: 0.75)."),
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
    first: First = None,
    passes: int = typer.Option(4, min=1, help="With --shares learned: passes over the text."),
    heads: HeadsKept = None,
    tokens: int = typer.Option(8192, min=1, help="Tokens of that text."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Average each layer's experts into one feed-forward part: a dense model that needs no router.

    For models whose experts began as copies of one part (`mixtura upcycle`) and were trained from there. What
    stands outside the experts stays as it is. With `--heads`, heads that are experts go instead, all but
    those of each layer that most tokens of the text choose.

    Example: `mixtura condense ./tuned-moe --shares load --out dense-again`
    Example: `mixtura condense ./tuned-moe --shares learned --text ./instructions.jsonl --out dense-again`
    """
    from mixtura.running.memory.process import settle

    settle(_MMAP_BYTES)
    from mixtura.checkpoints.upcycling.back import condense as write
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    if heads is not None:
        _heads(resolved.path, out, heads, tokens, text, as_json=as_json)
        return
    if first is not None and shares is not Shares.LEARNED:
        raise SettingError("--first says which share is not learned; give --shares learned as well")
    weights: Mapping[int, Sequence[float]] | None = None
    if shares is Shares.LEARNED:
        weights = _learned(resolved.path, out, (text, tokens), first, passes)
    elif shares is Shares.LOAD:
        weights = _by_load(resolved.path, text, tokens)
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


def _learned(
    path: Path, out: Path, text: tuple[Path | None, int], first: float | None, passes: int
) -> Mapping[int, Sequence[float]]:
    """Shares that are learned, with the plain average beside ``out`` for as long as it takes."""
    import shutil

    from transformers import AutoModelForCausalLM

    from mixtura.checkpoints.applying.staging import check_place
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.checkpoints.upcycling.back import condense as write
    from mixtura.running.observing.checkpoint import read_text
    from mixtura.running.shares import check_memory, learned_shares

    check_place(out, path)
    view = open_checkpoint(path)
    check_memory(view)
    batch = read_text(view, text[0], max_tokens=text[1], max_length=512)
    aside = out.with_name(f"{out.name}.even")
    try:
        write(path, aside, progress=False)
        dense = AutoModelForCausalLM.from_pretrained(aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)

    def told(line: str) -> None:
        typer.echo(line, err=True)

    return learned_shares(view, dense, batch, first=first, passes=passes, notify=told)


def _by_load(path: Path, text: Path | None, tokens: int) -> Mapping[int, Sequence[float]]:
    """Each expert's share of the assignments of its layer."""
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.running.observing.checkpoint import observe_checkpoint, read_text

    view = open_checkpoint(path)
    trace = observe_checkpoint(view, read_text(view, text, max_tokens=tokens, max_length=512))
    loads = {layer.index: layer.load.double() for layer in trace.layers}
    return {index: (load / load.sum()).tolist() for index, load in loads.items()}
