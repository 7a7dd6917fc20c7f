"""What commands with long work that can be continued say when they are interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


@contextmanager
def told_how_to_go_on(directory: Path) -> Iterator[None]:
    """Say after Ctrl-C what is kept, and where."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; nothing was written by halves: the same command goes on from what lies in "
            f"{directory}, and removing that directory starts over",
            err=True,
        )
        raise
