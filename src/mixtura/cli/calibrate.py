"""`mixtura calibrate`: what a decoder must learn of a model before it decodes with it."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from mixtura.cli._generating import Memory
from mixtura.cli._places import check_file
from mixtura.cli._settings import parse_settings
from mixtura.cli._tiers import DEFAULT_CACHE, NO_PREFETCH, check_words, wish_of


def calibrate(
    decoder: str = typer.Argument(help="A decoder that needs a calibration; `mixtura show NAME` says so."),
    model: str | None = typer.Argument(None, help="A directory, a hub id, or nothing for the specimen."),
    out: Path = typer.Option(..., help="The file to write (safetensors)."),
    text: Path | None = typer.Option(
        None,
        help="A UTF-8 file, records (.jsonl with prompt and answer) or a directory whose folders are labels; "
        "without it, tasks and text that come with mixtura.",
    ),
    num_texts: int = typer.Option(96, min=2, help="Texts to read at most."),
    changes: list[str] = typer.Option([], "--set", help="A setting of the decoder, such as top=2."),
    memory: Memory = None,
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Let a decoder learn of a model what it needs: important layers, task experts, reference samples.

    The file names the model's sizes and routers; with another model it is refused.

    Example: `mixtura calibrate modes ./OLMoE-1B-7B --out modes.safetensors`
    """
    check_file(out)
    check_words(memory, DEFAULT_CACHE, NO_PREFETCH, None)
    from mixtura.methods import create
    from mixtura.running.decoders.calibrating import calibrate_on, samples_of
    from mixtura.running.decoders.probing import save_calibration

    made = create("decoders", decoder, **parse_settings(changes))
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.running.loading import load
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    tokenizer = load_tokenizer(resolved.path)
    samples = samples_of(text, tokenizer, num_texts)
    lengths = [len(tokenizer(question + answer)["input_ids"]) for question, answer, _ in samples]
    # Question and answer apart may have a few tokens more than together.
    wish = wish_of(memory, DEFAULT_CACHE, NO_PREFETCH, None, max(lengths, default=1) + 16)
    found = calibrate_on(load(resolved.path, memory=wish), made, samples, tokenizer=tokenizer)
    save_calibration(found, out)
    if as_json:
        shapes = {name: list(tensor.shape) for name, tensor in found.tensors.items()}
        said = {"decoder": found.method, "file": str(out), "values": found.values, "tensors": shapes}
        typer.echo(json.dumps({"model": resolved.name, **said}))
        return
    for key, value in found.values.items():
        shown = json.dumps(value)
        typer.echo(f"{key}: {shown if len(shown) < 200 else shown[:200] + '…'}")
    typer.echo(f"calibration of {decoder} for {resolved.name}: {out}", err=True)
