"""`mixtura generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._decoding import asked_for, by_decoder
from mixtura.cli.doctor import path_lines
from mixtura.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixtura.kernels.paths import LayerPath
    from mixtura.running.decoders.entry import Decoded
    from mixtura.running.generation import Generated


def generate(
    model_or_prompt: str = typer.Argument(
        ..., metavar="[MODEL] PROMPT", help="A directory or hub id, and the text to continue (- reads it)."
    ),
    prompt: str | None = typer.Argument(None, metavar="", hidden=True),
    max_new_tokens: int = typer.Option(128, min=1, help="Tokens to generate at most."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    seed: int = typer.Option(0, min=0, help="Seed of the draws where the temperature is more than 0."),
    bits: int | None = typer.Option(
        None, help="Read experts that were stored with the quantizer nested at 8, 4 or 2 bits."
    ),
    chat: bool = typer.Option(False, "--chat", help="Put the prompt through the model's chat template."),
    decoder: str = typer.Option(
        "", help="Generate by this decoder, or several with commas; `mixtura methods decoders` lists them."
    ),
    changes: list[str] = typer.Option([], "--set", help="A setting of the decoder, such as beta=0.5."),
    verifier: Path | None = typer.Option(
        None, help="A .py file whose verify(prompt, texts) scores texts, for decoders that choose by one."
    ),
    calibration: Path | None = typer.Option(None, help="A file that `mixtura calibrate` made."),
    model_too: list[str] = typer.Option([], help="A further model, for decoders that run several."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Say which path each layer took, and why not a faster one."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object, when all is generated."),
) -> None:
    """Continue a prompt with a model, or with the specimen; `mixtura fit` makes models for it, too.

    Examples: `mixtura generate "def add(a, b):"`

    `mixtura generate ./OLMoE-1B-7B-fit "The capital of France is" --max-new-tokens 20`

    `mixtura generate "Question: What is 17 + 28?" --decoder scmoe --set beta=0.5`
    """
    model, text = _arguments(model_or_prompt, prompt)
    asked = asked_for(decoder, changes, verifier, calibration, model_too)
    loaded, tokenizer, name = _loaded(model, bits, yes=yes)
    from mixtura.running.generation import generate as generate_text

    run = generate_text if asked is None else by_decoder(asked, yes=yes)
    made = run(
        loaded,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        on_text=None if as_json else lambda piece: typer.echo(piece, nl=False),
    )
    _show(made, name, _taken(loaded) if verbose else None, as_json=as_json)


def _loaded(model: str | None, bits: int | None, *, yes: bool) -> tuple[PreTrainedModel, Any, str]:
    """The model, its tokenizer and its name."""
    # Before PyTorch is imported, and the tokenizer before the model: both keep the process small.
    from mixtura.running.memory.process import settle

    settle()
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    _check_model(resolved.path)
    tokenizer = load_tokenizer(resolved.path)
    from mixtura.running.loading import load

    return load(resolved.path, bits=bits), tokenizer, resolved.name


def _show(made: Generated | Decoded, name: str, taken: list[LayerPath] | None, *, as_json: bool) -> None:
    if not as_json:
        _say(made, taken or [])
        return
    from mixtura.running.memory.process import peak_resident_bytes

    more = {} if taken is None else {"layers": [asdict(path) for path in taken]}
    typer.echo(json.dumps({"model": name, **_fields(made), "peak_bytes": peak_resident_bytes()} | more))


def _say(made: Generated | Decoded, taken: list[LayerPath]) -> None:
    """What generating took, and which way it went, after a text that is printed already."""
    several = len(getattr(made, "branches", ())) > 1
    typer.echo(made.text if several else "")
    typer.echo(
        f"{made.num_prompt_tokens} tokens read in {made.prefill_ms / 1000:.2f} s, "
        f"{len(made.token_ids)} generated at {made.tokens_per_second:.1f} tokens/s",
        err=True,
    )
    if (cost := getattr(made, "cost", None)) is not None:
        typer.echo(
            f"{len(getattr(made, 'branches', ()))} branches; {cost.num_passes} forward passes of "
            f"{cost.num_tokens} tokens in all",
            err=True,
        )
    for line in path_lines(taken):
        typer.echo(line, err=True)


def _taken(model: PreTrainedModel) -> list[LayerPath]:
    """The path that each layer took when the text was generated."""
    from mixtura.kernels.paths import paths_of

    return paths_of(model, probe=False)


def _arguments(first: str, second: str | None) -> tuple[str | None, str]:
    """The model, None for the specimen, and the prompt.

    Raises:
        UserError: there is a model but no prompt.
    """
    model, prompt = (None, first) if second is None else (first, second)
    if second is None and Path(first).is_dir():
        raise UserError(f'{first} is a directory; give the text to continue after it, in quotes: "..."')
    return model, sys.stdin.read() if prompt == "-" else prompt


def _check_model(path: Path) -> None:
    """Refuse what is no model before its tokenizer is looked for.

    Raises:
        CheckpointError: it is a file, or has no config.json.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a model: it has no config.json; give the directory of a transformers model"
        )


def _fields(made: Generated | Decoded) -> dict[str, object]:
    return {
        "text": made.text,
        "num_prompt_tokens": made.num_prompt_tokens,
        "num_new_tokens": len(made.token_ids),
        "prefill_ms": made.prefill_ms,
        "tokens_per_second": made.tokens_per_second,
    } | _more(made)


def _more(made: Generated | Decoded) -> dict[str, object]:
    """What a decoder says besides."""
    branches = getattr(made, "branches", None)
    if branches is None:
        return {}
    shown = [{"text": one.text, "verdict": one.verdict} for one in branches]
    return {"branches": shown, "cost": asdict(getattr(made, "cost"))}  # noqa: B009
