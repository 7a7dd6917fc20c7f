"""The command line in processes that are forked from one that has imported everything already.

Importing PyTorch and transformers takes ten times what most commands take. A forked process has its own
memory, streams, threads, settings and exit code, so what a command does and says is what it does and says in
a fresh one; what depends on imports or on a process's size is tested in one that is really fresh.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
_SERVER = get_context("forkserver")
# What a command imports when it runs; a module that is missing here is imported then, and costs time only.
_SERVER.set_forkserver_preload(
    [
        "mixtura.cli",
        "mixtura.fitting.compressing.run",
        "mixtura.fitting.run",
        "mixtura.running.generation",
        "mixtura.running.loading",
        "mixtura.running.observing.checkpoint",
        "mixtura.checkpoints.summary",
        "mixtura.train.run",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)


def run_forked(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `mixtura` with these arguments to its end."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with _environment():
            process = _SERVER.Process(target=_run, args=(arguments, dict(os.environ), str(out), str(err)))
            process.start()
        process.join()
        assert process.exitcode is not None
        said = (path.read_text(encoding="utf-8") for path in (out, err))
        return subprocess.CompletedProcess(list(arguments), process.exitcode, *said)


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


def _run(arguments: Sequence[str], environment: dict[str, str], out: str, err: str) -> None:
    """In the new process: be what a shell would start."""
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["mixtura", *arguments]
    from mixtura.cli import main

    main()
