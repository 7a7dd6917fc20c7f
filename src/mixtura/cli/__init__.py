"""The `mixtura` command, one file a command: parse, call, print."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import warnings
from importlib import import_module
from typing import Any

import typer

import mixtura
from mixtura.errors import EXIT_USER_ERROR, MixturaWarning, UserError, one_line
from mixtura.machine.waiting import wait_asleep

# Command -> line shown by `mixtura --help`; the function of that name lives in the file of that name
# (`new` is a file, too, though a hyphen in a command would be an underscore in its file). A command that has
# commands of its own is an app of that name.
COMMANDS = (
    "fit",
    "compress",
    "inspect",
    "doctor",
    "observe",
    "analyze",
    "generate",
    "serve",
    "chat",
    "verify",
    "calibrate",
    "export",
    "train",
    "tune",
    "merge",
    "upcycle",
    "compose",
    "ensemble",
    "condense",
    "factor",
    "split",
    "route",
    "gateway",
    "plan",
    "arena",
    "methods",
    "show",
    "new",
    "check",
)
EXIT_INTERRUPTED = 130
# Whoever read the output went away.
EXIT_CLOSED = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
EPILOG = (
    "Exit codes: 0 done; 1 `check` found a promise broken, or `verify` a difference; 2 mistyped, missing or "
    "damaged, and what to give instead; 3 understood, but it cannot be had: a budget that nothing meets, "
    "more loss than --max-kl; 130 interrupted."
)


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
        epilog=EPILOG,
        help="Mixture-of-Experts models from end to end: inspect, observe, fit to memory, compress, run. "
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
        found = getattr(import_module(f"mixtura.cli.{name}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def main() -> None:
    """Run the command line. A user's error is one sentence and its exit code; Ctrl-C is 130."""
    # The hub is asked only when a command needs it; tokenizers warns about forks nobody asked for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wait_asleep()
    _show_every_character()
    _heed_no_color()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MixturaWarning)
            warnings.showwarning = _shown_by(warnings.showwarning)
            try:
                build_app()(prog_name="mixtura")
            finally:
                # What is still held back fails here, where it can be said, not when Python ends.
                _flush()
    except UserError as error:
        _refuse(one_line(error), error.exit_code)
    except KeyboardInterrupt:
        _refuse("interrupted", EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno == errno.EPIPE:
            # Whoever read has read enough.
            _abandon_output()
            sys.exit(EXIT_CLOSED)
        if error.errno in _NO_ACCESS and error.filename:
            why = (error.strerror or "no access").lower()
            _refuse(f"{error.filename} cannot be used ({why}); give a path that can", EXIT_USER_ERROR)
        if error.errno not in _NO_ROOM:
            raise
        _abandon_output()
        where = f"the disk of {error.filename}" if error.filename else "the disk that is written to"
        _refuse(f"{where} is full ({error.strerror}); make room and give the command again", EXIT_USER_ERROR)


def _heed_no_color() -> None:
    """Help and usage errors without styles, too, where NO_COLOR asks for that."""
    if os.environ.get("NO_COLOR"):
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _refuse(sentence: str, code: int) -> None:
    """Say a sentence on standard error, if anybody still listens, and exit."""
    with contextlib.suppress(OSError):
        typer.echo(f"error: {sentence}", err=True)
    sys.exit(code)


def _abandon_output() -> None:
    """Let what is still held back for standard output go nowhere: at its end Python would try once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
