"""The `mixtura` command, one file a command: parse, call, print."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer

import mixtura
from mixtura.errors import UserError

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
    try:
        build_app()()
    except UserError as error:
        message = " ".join(str(error).split())
        typer.echo(f"error: {message}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written by halves; a fit asked for again continues", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
