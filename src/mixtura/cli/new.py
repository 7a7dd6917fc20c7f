"""`mixtura new`: start a method."""

from __future__ import annotations

from pathlib import Path

import typer


def new(
    kind: str = typer.Argument(help="The kind, such as router."),
    name: str = typer.Argument(help="The method's name in snake_case."),
    out: Path | None = typer.Option(
        None, help="Folder to write to. Default: the kind's own in a checkout of mixtura, else this one."
    ),
) -> None:
    """Write the file of a new method, which already keeps the contract of its kind.

    Example:

        mixtura new router my_router && mixtura check router my_router.py
    """
    from mixtura.authoring.scaffold import new_method
    from mixtura.methods import PACKAGE_DIR
    from mixtura.methods import kind as find_kind

    written = new_method(kind, name, out)
    for path in written:
        typer.echo(f"wrote {path}")
    singular = find_kind(kind).singular
    installed = written[0].resolve().is_relative_to(PACKAGE_DIR)
    typer.echo(f"next: mixtura check {singular} {name if installed else written[0]}", err=True)
    if installed:
        typer.echo("then: python -m mixtura.authoring.docs writes its page", err=True)
