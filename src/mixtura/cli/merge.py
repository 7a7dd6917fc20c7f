"""`mixtura merge`: write an adapter into its model's weights, as an ordinary checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import typer

from mixtura.cli._places import check_folder


def merge(
    adapter: Path = typer.Argument(help="The directory of the adapter, such as tuned/expert_lora/adapter."),
    out: Path = typer.Option(..., help="Directory of the merged model; it must not be there yet."),
    base: str | None = typer.Option(
        None, help="The model that it was trained on. Default: the one that the adapter names."
    ),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Merge an adapter, so that plain transformers, llama.cpp and servers run what it learned.

    Example: `mixtura merge tuned/expert_lora/adapter --out ./merged`
    """
    from mixtura.running.adapters import base_of
    from mixtura.running.resolve import resolve_model

    check_folder(out)
    resolved = resolve_model(base_of(adapter, base), assume_yes=yes)
    import transformers

    from mixtura.train.merging import merge as write_merged

    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    written = write_merged(adapter, resolved.path, out)
    if as_json:
        typer.echo(json.dumps({"model": str(written), "base": resolved.name, "adapter": str(adapter)}))
    else:
        typer.echo(f"{adapter} is merged into {resolved.name}; the model is in {written}")
