"""`mixtura generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._tiers import CACHE, MEMORY, PREFETCH, TRACE, check_words, tier_fields, tier_lines, wish_of
from mixtura.cli.doctor import path_lines
from mixtura.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixtura.kernels.paths import LayerPath
    from mixtura.running.generation import Generated

_VERBOSE = "Say which path each layer took and why not a faster one, and with --memory what was read."


def generate(
    model_or_prompt: str = typer.Argument(
        ..., metavar="[MODEL] PROMPT", help="A directory or hub id, and the text to continue (- reads it)."
    ),
    prompt: str | None = typer.Argument(None, metavar="", hidden=True),
    max_new_tokens: int = typer.Option(128, min=1, help="Tokens to generate at most."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    seed: int = typer.Option(0, min=0, help="Seed of the draws where the temperature is more than 0."),
    bits: int | None = typer.Option(None, help="Read experts of the quantizer nested at 8, 4 or 2 bits."),
    memory: str | None = MEMORY,
    cache: str = CACHE,
    prefetch: str = PREFETCH,
    trace: Path | None = TRACE,
    chat: bool = typer.Option(False, "--chat", help="Put the prompt through the model's chat template."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help=_VERBOSE),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object, when all is generated."),
) -> None:
    """Continue a prompt with a model, or with the specimen; `mixtura fit` makes models for it, too.

    Examples: `mixtura generate "def add(a, b):"`

    `mixtura generate ./OLMoE-1B-7B-fit "The capital of France is" --max-new-tokens 20`

    `mixtura generate ./Qwen3-30B-A3B "Once upon a time" --memory 8GiB -v`
    """
    model, text = _arguments(model_or_prompt, prompt)
    check_words(memory, cache, prefetch, trace)
    # Before PyTorch is imported, and the tokenizer before the model: both keep the process small.
    from mixtura.running.memory.process import peak_resident_bytes, settle

    settle()
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    tokenizer = _tokenizer(resolved.path)
    from mixtura.running.generation import generate as generate_text
    from mixtura.running.loading import load

    context = _num_tokens(tokenizer, text, chat) + max_new_tokens if memory else 1
    loaded = load(resolved.path, bits=bits, memory=wish_of(memory, cache, prefetch, trace, context))
    made = generate_text(
        loaded,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        on_text=None if as_json else lambda piece: typer.echo(piece, nl=False),
    )
    taken = _taken(loaded) if verbose else None
    if as_json:
        more = tier_fields(loaded) | ({} if taken is None else {"layers": [asdict(path) for path in taken]})
        peak = peak_resident_bytes()
        typer.echo(json.dumps({"model": resolved.name, **_fields(made), "peak_bytes": peak} | more))
    else:
        _say(made, path_lines(taken) + tier_lines(loaded) if taken is not None else [])


def _num_tokens(tokenizer: Any, text: str, chat: bool) -> int:
    """Tokens of the prompt, which decide what the cache takes."""
    from mixtura.running.generation import encode_prompt

    return encode_prompt(tokenizer, text, chat=chat).shape[0]


def _say(made: Generated, lines: list[str]) -> None:
    """What generating took, and which way it went, after a text that is printed already."""
    typer.echo()
    typer.echo(
        f"{made.num_prompt_tokens} tokens read in {made.prefill_ms / 1000:.2f} s, "
        f"{len(made.token_ids)} generated at {made.tokens_per_second:.1f} tokens/s",
        err=True,
    )
    for line in lines:
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


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a model's directory.

    Raises:
        CheckpointError: it is a file, or has no config.json.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a model: it has no config.json; give the directory of a transformers model"
        )
    from mixtura.checkpoints.tokenizer import load_tokenizer

    return load_tokenizer(path)


def _fields(made: Generated) -> dict[str, object]:
    return {
        "text": made.text,
        "num_prompt_tokens": made.num_prompt_tokens,
        "num_new_tokens": len(made.token_ids),
        "prefill_ms": made.prefill_ms,
        "tokens_per_second": made.tokens_per_second,
    }
