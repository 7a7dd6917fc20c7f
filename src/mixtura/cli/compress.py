"""`mixtura compress`: drop, merge and round a model's experts by methods that are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._going_on import told_how_to_go_on
from mixtura.errors import SettingError

if TYPE_CHECKING:
    from mixtura.fitting.compressing.records import Choices

_MMAP_BYTES = 16 << 20

_MERGE = "Store groups of experts as one by this merger; needs --keep."
_NEURONS = "Take neurons out of every expert by this trimmer; needs --keep-neurons, and goes alone."
_KEEP_NEURONS = "Share of every expert's neurons to leave, such as 0.75."
_SET = (
    "A setting of a method, as prune.renormalize=true or quantize.group_size=32; may be repeated. "
    "`mixtura show METHOD` lists them."
)
_REST = "8 or 4: store attention, embeddings, head and other weights outside the experts in so many bits."
_SERVABLE = "Leave only numbers of experts that vLLM's fused routers take."
_TEXT = (
    "Text to calibrate on and to judge by: a file or directory of UTF-8 text or JSONL. Default: text that "
    "comes with mixtura."
)
_FORMAT = (
    "mixtura: a directory, ordinary wherever it can be. gguf: a file for llama.cpp. compressed-tensors: a "
    "directory for transformers and vLLM, of --quantize integers."
)


def compress(
    model: str | None = typer.Argument(
        None, help="Directory or hub id (name@revision); without it, the specimen.", show_default=False
    ),
    out: Path = typer.Option(..., help="New directory for the result, or the new file of --format gguf."),
    prune: str | None = typer.Option(None, help="Drop experts by this pruner; needs --keep."),
    merge: str | None = typer.Option(None, help=_MERGE),
    keep: float | None = typer.Option(None, help="Share of each layer's experts to leave, such as 0.5."),
    neurons: str | None = typer.Option(None, help=_NEURONS),
    keep_neurons: float | None = typer.Option(None, help=_KEEP_NEURONS),
    quantize: str | None = typer.Option(None, help="Round the experts that are left by this quantizer."),
    bits: float | None = typer.Option(None, help="Bits of a weight, for --quantize."),
    rest_bits: int | None = typer.Option(None, help=_REST),
    settings: list[str] = typer.Option([], "--set", help=_SET),
    servable: bool = typer.Option(False, "--servable", help=_SERVABLE),
    text: Path | None = typer.Option(None, help=_TEXT),
    tokens: int = typer.Option(16_384, min=1, help="Tokens of calibration text at most."),
    length: int = typer.Option(512, min=2, help="Tokens of a sequence at most."),
    measure: bool = typer.Option(True, help="Measure the loss on held-out text."),
    to_format: str = typer.Option("mixtura", "--format", help=_FORMAT),
    types: list[str] = typer.Option([], "--type", help="Types of a GGUF file; see `mixtura export`."),
    yes: bool = typer.Option(False, "--yes", help="Download from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    seed: int = typer.Option(0, min=0, help="Seed of the choice of text, and of methods that draw lots."),
) -> None:
    """Drop, merge and round a model's experts by methods that you name, calibrated by one pass over text.

    The model is read layer by layer, so that it may be larger than memory. Stopped work goes on when the
    same command is given again, and ends with the same bytes.

    Example: `mixtura compress ./OLMoE-1B-7B --prune reap --keep 0.5 --quantize trellis --bits 3 --out small`
    """
    from mixtura.running.memory.process import settle

    # Before PyTorch is first used: a large model is streamed through little memory.
    settle(_MMAP_BYTES)
    from mixtura.fitting.compressing.records import Choices
    from mixtura.running.resolve import resolve_model

    given: dict[str, Any] = {"settings": _parsed(settings), "types": tuple(types), "to_format": to_format}
    given |= {"prune": prune, "merge": merge, "keep": keep, "servable": servable}
    given |= {"neurons": neurons, "keep_neurons": keep_neurons}
    given |= {"quantize": quantize, "bits": bits, "rest_bits": rest_bits, "measure": measure, "seed": seed}
    given |= {"text": text, "tokens": tokens, "length": length}
    resolved = resolve_model(model, assume_yes=yes)
    _run(Choices(model=resolved.path, name=resolved.name, out=out, **given), as_json)


def _parsed(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Settings by choice; a value that is no JSON is text."""
    found: dict[str, dict[str, Any]] = {}
    for said in settings:
        where, equals, value = said.partition("=")
        choice, dot, name = where.partition(".")
        if not equals or not dot or not name:
            raise SettingError(f"--set takes METHOD.NAME=VALUE, such as quantize.group_size=32, got {said!r}")
        try:
            read = json.loads(value)
        except json.JSONDecodeError:
            read = value
        found.setdefault(choice, {})[name] = read
    return found


def _run(choices: Choices, as_json: bool) -> None:
    """Compress, saying what is being done, and print the result."""
    from mixtura.fitting.compressing.printing import print_compressed
    from mixtura.fitting.compressing.run import carry_out
    from mixtura.fitting.printing import narrated
    from mixtura.fitting.publishing import beside

    with told_how_to_go_on(beside(choices.out)), narrated() as notify:
        made = carry_out(choices, notify)
    typer.echo(json.dumps(made.to_dict(), indent=1)) if as_json else print_compressed(made)
