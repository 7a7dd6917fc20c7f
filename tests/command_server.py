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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)


def run_forked(arguments: Sequence[str], *, killed_at: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `mixtura` with these arguments to its end, or kill it where it renames a file for this time.

    What is written is renamed into its place when it is whole, so these are the moments that differ.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _start(arguments, out, err, killed_at)
        process.join()
        assert process.exitcode is not None
        said = (path.read_text(encoding="utf-8") for path in (out, err))
        return subprocess.CompletedProcess(list(arguments), process.exitcode, *said)


def stopped_when(arguments: Sequence[str], reached: str, how: signal.Signals) -> int:
    """Run `mixtura`, send it a signal soon after it says that it reached a step, and give its exit code."""
    with TemporaryDirectory() as folder:
        err = Path(folder, "err")
        err.touch()
        process = _start(arguments, Path(folder, "out"), err)
        while process.is_alive() and reached not in err.read_text(encoding="utf-8"):
            time.sleep(0.02)
        time.sleep(0.2)
        assert process.pid
        if process.is_alive():
            os.kill(process.pid, how)
        process.join()
        assert process.exitcode is not None
        return process.exitcode


def _start(arguments: Sequence[str], out: Path, err: Path, killed_at: int = 0) -> BaseProcess:
    """Fork a process that has what it says written to these files."""
    with _environment():
        settings = (arguments, dict(os.environ), str(out), str(err), killed_at)
        process = _SERVER.Process(target=_run, args=settings)
        process.start()
    return process


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


def _run(arguments: Sequence[str], environment: dict[str, str], out: str, err: str, killed_at: int) -> None:
    """In the new process: be what a shell would start."""
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["mixtura", *arguments]
    if killed_at:
        _kill_at_rename(killed_at)
    from mixtura.cli import main

    main()


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
