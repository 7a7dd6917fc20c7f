"""`mixtura generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._decoding import asked_for, by_decoder
from mixtura.cli._generating import (
    Adapter,
    Bits,
    Cache,
    Calibration,
    Changes,
    DecoderNames,
    Memory,
    ModelToo,
    Prefetch,
    TraceFile,
    Unmerged,
    VerifierFile,
    Wanted,
    loaded,
)
from mixtura.cli._tiers import DEFAULT_CACHE, NO_PREFETCH, check_words, tier_fields, tier_lines
from mixtura.cli.doctor import path_lines
from mixtura.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixtura.kernels.paths import LayerPath
    from mixtura.running.decoders.entry import Decoded
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
    bits: Bits = None,
    memory: Memory = None,
    cache: Cache = DEFAULT_CACHE,
    prefetch: Prefetch = NO_PREFETCH,
    trace: TraceFile = None,
    adapter: Adapter = None,
    unmerged: Unmerged = False,
    chat: bool = typer.Option(False, "--chat", help="Put the prompt through the model's chat template."),
    decoder: DecoderNames = "",
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    verifier: VerifierFile = None,
    calibration: Calibration = None,
    model_too: ModelToo = [],  # noqa: B006
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help=_VERBOSE),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object, when all is generated."),
) -> None:
    """Continue a prompt with a model, or with the specimen; `mixtura fit` makes models for it, too.

    Examples: `mixtura generate "def add(a, b):"`

    `mixtura generate ./OLMoE-1B-7B-fit "The capital of France is" --max-new-tokens 20`

    `mixtura generate ./Qwen3-30B-A3B "Once upon a time" --memory 8GiB -v`

    `mixtura generate "Question: What is 17 + 28?" --decoder scmoe --set beta=0.5`
    """
    model, text = _arguments(model_or_prompt, prompt)
    check_words(memory, cache, prefetch, trace)
    asked = asked_for(decoder, changes, verifier, calibration, model_too)
    place = {"memory": memory, "cache": cache, "prefetch": prefetch, "trace": trace, "adapter": adapter}
    said = {"text": text, "chat": chat, "max_new_tokens": max_new_tokens}
    wanted = Wanted(bits=bits, merge=not unmerged, **place, **said)  # type: ignore[arg-type]
    wanted.check()
    found, tokenizer, name = loaded(model, wanted, yes=yes)
    run = _by_itself if asked is None else by_decoder(asked, yes=yes)
    tell = None if as_json else _tell
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    made = run(found, tokenizer, text, **options, on_text=tell)
    _show(made, name, found, verbose=verbose, as_json=as_json)


def _by_itself(*arguments: Any, **options: Any) -> Generated:
    from mixtura.running.generation import generate as generate_text

    return generate_text(*arguments, **options)


def _tell(piece: str) -> None:
    typer.echo(piece, nl=False)


def _show(made: Generated | Decoded, name: str, model: Any, *, verbose: bool, as_json: bool) -> None:
    taken = _taken(model) if verbose else None
    if not as_json:
        _say(made, [] if taken is None else path_lines(taken) + tier_lines(model))
        return
    from mixtura.running.memory.process import peak_resident_bytes

    more = tier_fields(model) | ({} if taken is None else {"layers": [asdict(path) for path in taken]})
    typer.echo(json.dumps({"model": name, **_fields(made), "peak_bytes": peak_resident_bytes()} | more))


def _say(made: Generated | Decoded, lines: list[str]) -> None:
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
