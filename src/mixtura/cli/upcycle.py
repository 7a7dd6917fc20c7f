"""`mixtura upcycle`: a Mixture-of-Experts model of a dense one."""

from __future__ import annotations

from typing import Annotated

import typer

from mixtura.cli._settings import parse_settings
from mixtura.cli._upcycling import (
    AsJson,
    Changes,
    Length,
    Measure,
    Out,
    Seed,
    Target,
    Text,
    TopK,
    Yes,
    run,
)

Model = Annotated[
    str,
    typer.Argument(
        help="A dense model, or an MoE model for methods that change one: a directory, or a hub id "
        "(owner/name, owner/name@revision)."
    ),
]
Method = Annotated[
    str, typer.Option(help="An upcycler, by name or .py file. `mixtura methods upcyclers` lists them.")
]
Experts = Annotated[int | None, typer.Option(min=2, help="Experts of each layer. Default: 8.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of calibration text, where the method reads any.")]


def upcycle(
    model: Model,
    *,
    out: Out,
    method: Method = "copies",
    experts: Experts = None,
    top_k: TopK = 2,
    target: Target = None,
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    text: Text = None,
    tokens: Tokens = 8192,
    length: Length = 512,
    measure: Measure = True,
    seed: Seed = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a Mixture-of-Experts model of a dense one: an ordinary checkpoint, tried at once.

    Weights go from disk to disk, one expert in memory at a time. Stopped work goes on when the same command
    is given again, and ends with the same bytes. `mixtura tune` goes on from the result.

    Example: `mixtura upcycle ./Llama-3.2-1B --method dynamic_dino --experts 16 --top-k 4 --out Llama-16x`
    """
    run(
        [model],
        as_json,
        yes,
        out=out,
        method=method,
        experts=experts,
        top_k=top_k,
        target=target,
        settings=parse_settings(changes),
        text=text,
        tokens=tokens,
        length=length,
        measure=measure,
        seed=seed,
    )
