"""`mixtura compose`: one Mixture-of-Experts model of several dense ones."""

from __future__ import annotations

from pathlib import Path
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

Models = Annotated[
    list[str],
    typer.Argument(
        help="Dense models that were made from the same one: directories or hub ids. The first gives what is "
        "not an expert, unless the method averages that."
    ),
]
Method = Annotated[
    str, typer.Option(help="An upcycler of several models. `mixtura methods upcyclers` lists them.")
]
Experts = Annotated[
    int | None, typer.Option(min=2, help="Experts of each layer. Default: one for each model.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(help='Prompts for each model, a JSON file: {"MODEL": ["a prompt"], "OTHER": "texts/"}.'),
]


def compose(
    models: Models,
    *,
    out: Out,
    method: Method = "prompt_gates",
    experts: Experts = None,
    top_k: TopK = 2,
    prompts: Prompts = None,
    target: Target = None,
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    text: Text = None,
    length: Length = 512,
    measure: Measure = True,
    seed: Seed = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make one Mixture-of-Experts model of several dense ones: an ordinary checkpoint, tried at once.

    Each model gives experts, and a router is made of prompts for each, or by the method's own rule. Weights
    go from disk to disk, one expert in memory at a time; stopped work goes on when the same command is given
    again.

    Example: `mixtura compose ./base ./math ./code --method dume --prompts prompts.json --top-k 1 --out three`
    """
    run(
        models,
        as_json,
        yes,
        composes=True,
        out=out,
        method=method,
        experts=experts,
        top_k=top_k,
        prompts=prompts,
        target=target,
        settings=parse_settings(changes),
        text=text,
        length=length,
        measure=measure,
        seed=seed,
    )
