"""The command line in processes that are forked from one that has imported everything already.

Importing PyTorch and transformers takes ten times what most commands take. A forked process has its own
memory, streams, threads, settings and exit code, so what a command does and says is what it does and says in
a fresh one; what depends on imports or on a process's size is tested in one that is really fresh.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
_SERVER = get_context("forkserver")
# What a command imports when it runs; a module that is missing here is imported then, and costs time only.
_SERVER.set_forkserver_preload(
    [
        "mixtura.cli",
        "mixtura.fitting.compressing.run",
        "mixtura.fitting.run",
        "mixtura.fitting.upcycling.run",
        "mixtura.running.generation",
        "mixtura.running.loading",
        "mixtura.running.observing.checkpoint",
        "mixtura.checkpoints.summary",
        "mixtura.train.run",
        "mixtura.train.specimen.make",
        "mixtura.train.tuning.run",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)


def run_forked(arguments: Sequence[str], *, killed_at: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `mixtura` with these arguments to its end, or kill it where it renames a file for this time.

    What is written is renamed into its place when it is whole, so these are the moments that differ.
    """
    process = Forked(arguments, killed_at=killed_at)
    said = process.communicate()
    return subprocess.CompletedProcess(list(arguments), process.returncode, *said)


def stopped_when(arguments: Sequence[str], reached: str, how: signal.Signals) -> int:
    """Run `mixtura`, send it a signal where it says that it reached a step, and give its exit code."""
    process = Forked(arguments, stopped=(reached, how))
    process.communicate()
    return process.returncode


@final
class Forked:
    """A command that runs in a process of its own, in a group of its own, to be used as one of `subprocess`.

    Args:
        arguments: What stands behind ``mixtura`` on the command line.
        entry: The module whose ``main`` is run.
        killed_at: As of `run_forked`.
        stopped: What it says on standard error when it is sent which signal.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        entry: str = "mixtura.cli",
        killed_at: int = 0,
        stopped: tuple[str, signal.Signals] | None = None,
    ) -> None:
        self._folder = TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._files:
            file.touch()
        with _environment():
            files = [str(file) for file in self._files]
            settings = (arguments, dict(os.environ), files, entry, killed_at, stopped)
            self._process = _SERVER.Process(target=_run, args=settings)
            self._process.start()

    @property
    def pid(self) -> int:
        """Its number, and that of its group."""
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int:
        """How it ended: negative where by a signal."""
        assert self._process.exitcode is not None
        return self._process.exitcode

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.exitcode

    def error_so_far(self) -> str:
        """What it has said on standard error."""
        return self._files[1].read_text(encoding="utf-8")

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end: what it said on standard output and on standard error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("mixtura", timeout or 0.0)
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        return out, err


@contextmanager
def _environment() -> Iterator[None]:
    """What commands find in their environment; PyTorch reads some of it when the server imports it."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    arguments: Sequence[str],
    environment: dict[str, str],
    files: list[str],
    entry: str,
    killed_at: int,
    stopped: tuple[str, signal.Signals] | None,
) -> None:
    """In the new process: be what a shell would start."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["mixtura", *arguments]
    if killed_at:
        _kill_at_rename(killed_at)
    if stopped:
        _stop_when_said(*stopped)
    sys.exit(import_module(entry).main())


def _kill_at_rename(number: int) -> None:
    """End this process, as a loss of power would, where it is about to rename a file for this time."""
    rename, left = os.replace, number

    def counted(*arguments: Any, **named: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*arguments, **named)

    # What pathlib calls, too.
    os.replace = counted


def _stop_when_said(reached: str, how: signal.Signals) -> None:
    """Send this process a signal, once, where it has said this on standard error."""
    write, said, sent = sys.stderr.write, "", False

    def listened(text: str) -> int:
        nonlocal said, sent
        length = write(text)
        said += text
        if reached in said and not sent:
            sent = True
            os.kill(os.getpid(), how)
        return length

    sys.stderr.write = listened  # type: ignore[method-assign]
