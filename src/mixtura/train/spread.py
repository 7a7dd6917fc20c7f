"""Training with experts on several processes: starting them, and checkpoints that do not know of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from mixtura.errors import UnmetError, UserError

if TYPE_CHECKING:
    from mixtura.running.parallel.entry import Parallel

_POLL_S = 0.2
# How long others wait for a process before they give it up.
TIMEOUT_S = 600
# The exit code of a process that lost touch with another, and what says that `run_processes` started it.
LOST = 75
STARTED = "MIXTURA_SPREAD"
_SIGNALS = range(-64, 0)
_OPTIMIZER = "optimizer.pt"


def started() -> int | None:
    """How many processes a launcher such as torchrun started; None where this one was started alone."""
    size = os.environ.get("WORLD_SIZE")
    return None if size is None else int(size)


def check_size(wanted: int) -> None:
    """Refuse a number of expert-parallel processes that does not fit those that were started.

    Raises:
        UserError: it does not divide them.
    """
    size = started()
    if size is not None and size % wanted:
        raise UserError(
            f"--expert-parallel {wanted} does not divide the {size} processes that were started; start "
            f"a multiple of {wanted}, or give a number that divides {size}"
        )


def run_processes(num_processes: int, arguments: Sequence[str], directory: Path) -> int:
    """Run `mixtura` with these arguments in so many processes that train together; the first's exit code.

    What the first writes is written; of the others only what they say when they fail and it does not.

    Raises:
        UnmetError: a process was killed or failed; the others are ended.
    """
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(num_processes)]
        children = _started(num_processes, arguments, logs)
        try:
            failed = _first_failed(children)
        finally:
            _end(children)
        if failed is None:
            return 0
        rank, code = failed
        if code not in (LOST, *_SIGNALS) and rank == 0:
            return code
        raise UnmetError(
            f"process {rank} of {num_processes} {_what(code, logs[rank])}, and all were ended; the same "
            f"command goes on from the last checkpoint in {directory}"
        )


def _started(num: int, arguments: Sequence[str], logs: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num),
            "LOCAL_WORLD_SIZE": str(num),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            STARTED: "1",
        }
        command = [sys.executable, "-m", "mixtura", *arguments]
        if rank == 0:
            children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
            continue
        with logs[rank].open("wb") as log:
            child = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
        children.append(child)
    return children


def _first_failed(children: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """The rank and exit code of the first process that fails; None when all are done."""
    while True:
        codes = [child.poll() for child in children]
        # A signal from outside comes first: the others may have failed for want of that process.
        failed = sorted((code, rank) for rank, code in enumerate(codes) if code)
        if failed:
            code, rank = failed[0]
            return rank, code
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL_S)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _what(code: int, log: Path) -> str:
    """What became of a process."""
    if code < 0:
        return f"was ended by {_signal_name(-code)}"
    if code == LOST:
        return f"waited in vain for another one, which hangs or is gone ({TIMEOUT_S} s at most)"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f"failed ({said[-1] if said else f'exit code {code}'})"


def lost_touch(error: RuntimeError) -> bool:
    """Whether an error says that another process does not answer any more."""
    said = str(error).lower()
    return any(word in said for word in ("gloo", "connection closed", "connection reset", "timed out"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def save_optimizer(parallel: Parallel, optimizer: Any, output_dir: str) -> None:
    """Write an optimizer's states as one process has them; every process takes part."""
    plain = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in parallel.model.named_parameters()}
    state = plain.state_dict()
    every = [parameter for group in plain.param_groups for parameter in group["params"]]
    experts = parallel.expert_names()
    for number, parameter in enumerate(every):
        name = names[id(parameter)]
        if name not in experts:
            continue
        kept = state["state"].get(number, {})
        state["state"][number] = {
            key: parallel.gathered(name, value) if value.shape == parameter.shape else value
            for key, value in kept.items()
        }
    if parallel.wire.rank == 0:
        torch.save(state, Path(output_dir) / _OPTIMIZER)


def cut_optimizer(parallel: Parallel, optimizer: Any) -> None:
    """Leave this process its own of the states of all experts that an optimizer was loaded with."""
    plain = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in parallel.model.named_parameters()}
    experts = parallel.expert_names()
    for parameter, kept in plain.state.items():
        name = names[id(parameter)]
        if name in experts:
            for key, value in kept.items():
                if torch.is_tensor(value) and value.dim() == parameter.dim():
                    kept[key] = parallel.mine_of(name, value)
