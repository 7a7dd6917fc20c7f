"""Options that `mixtura upcycle` and `mixtura compose` share, and how both run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli._going_on import told_how_to_go_on

if TYPE_CHECKING:
    from mixtura.fitting.upcycling.records import Request

# Before PyTorch is first used: models are streamed through little memory.
_MMAP_BYTES = 1 << 20

Out = Annotated[Path, typer.Option(help="The new directory.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Experts that a token is routed to.")]
Target = Annotated[
    str | None,
    typer.Option(
        help="MoE family of the result: mixtral, qwen2_moe, qwen3_moe, granitemoeshared, dots1, flex_olmo, "
        "or mixtura for one of its own. Default: the first that can hold it."
    ),
]
Changes = Annotated[list[str], typer.Option("--set", help="A setting of the method, such as redrawn=0.5.")]
Text = Annotated[
    Path | None,
    typer.Option(
        help="Text to try it on, and to calibrate on where the method reads any: a file or directory."
    ),
]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a sequence at most.")]
Measure = Annotated[
    bool, typer.Option("--measure/--no-measure", help="Try the result beside the dense models.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of what is drawn, and of the choice of text.")]
Yes = Annotated[bool, typer.Option("--yes", help="Download a model from the hub without asking.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run(models: Sequence[str], as_json: bool, yes: bool, **asked: Any) -> None:
    """Make the model, saying what is being done, and print what came of it."""
    from mixtura.running.memory.process import settle

    settle(_MMAP_BYTES)
    import transformers

    # What is being done is told in words.
    transformers.utils.logging.disable_progress_bar()
    from mixtura.fitting.upcycling.records import Request
    from mixtura.running.resolve import resolve_model

    resolved = [resolve_model(model, assume_yes=yes) for model in models]
    request = Request(
        sources=tuple(one.path for one in resolved), names=tuple(one.name for one in resolved), **asked
    )
    _carry_out(request, as_json)


def _carry_out(request: Request, as_json: bool) -> None:
    from mixtura.fitting.printing import narrated
    from mixtura.fitting.publishing import beside
    from mixtura.fitting.upcycling.printing import print_upcycled
    from mixtura.fitting.upcycling.run import carry_out

    with told_how_to_go_on(beside(request.out)), narrated() as notify:
        made = carry_out(request, notify)
    typer.echo(json.dumps(made.to_dict(), indent=1)) if as_json else print_upcycled(made)
