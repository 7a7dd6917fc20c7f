"""The `mixtura` command, one file a command: parse, call, print."""

from __future__ import annotations

import io
import os
import sys
import warnings
from importlib import import_module
from typing import Any

import typer

import mixtura
from mixtura.errors import MixturaWarning, UserError, one_line

# Command -> line shown by `mixtura --help`; the function of that name lives in the file of that name
# (`new` is a file, too, though a hyphen in a command would be an underscore in its file).
COMMANDS = (
    "fit",
    "inspect",
    "doctor",
    "observe",
    "generate",
    "train",
    "arena",
    "methods",
    "show",
    "new",
    "check",
)
EXIT_INTERRUPTED = 130


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"mixtura {mixtura.__version__}")
        raise typer.Exit
    return wanted


def build_app() -> typer.Typer:
    """The command line with every command attached."""
    app = typer.Typer(
        name="mixtura",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="Mixture-of-Experts models from end to end: inspect, observe, fit to memory, run. "
        "Without a MODEL every command uses the specimen, a small trained model that comes with mixtura.",
    )

    @app.callback()
    def _root(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", callback=_version, is_eager=True
        ),
    ) -> None:
        del version

    for name in COMMANDS:
        app.command(name)(getattr(import_module(f"mixtura.cli.{name}"), name))
    return app


def main() -> None:
    """Run the command line. A user's error is one sentence and its exit code; Ctrl-C is 130."""
    # The hub is asked only when a command needs it; tokenizers warns about forks nobody asked for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _show_every_character()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MixturaWarning)
            warnings.showwarning = _shown_by(warnings.showwarning)
            build_app()()
    except UserError as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written by halves; a fit asked for again continues", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)


def _show_every_character() -> None:
    """Let names that are no text, and terminals that know few characters, show as escapes instead of fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _shown_by(others: Any) -> Any:
    """Shows our warnings as sentences, and others as they were shown."""

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, MixturaWarning):
            typer.echo(f"warning: {one_line(message)}", err=True)
        else:
            others(message, category, *where, **more)

    return show
