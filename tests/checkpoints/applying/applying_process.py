"""What runs in processes of their own: applying a plan while it is killed, limited or measured."""

from __future__ import annotations

import resource
import signal
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from mixtura.checkpoints.apply import apply_plan, planned_num_bytes
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.view import open_model
from mixtura.types import Drop, Plan, Quantize


def mixed_plan(source: Path) -> Plan:
    """Experts of every width, and one of eight dropped in each layer."""
    layers = open_model(source).layers
    drops = [Drop(layer.index, (layer.num_experts - 1,)) for layer in layers]
    widths = [
        Quantize(layer.index, expert, "round_to_nearest", {"bits": (8, 4, 2)[expert % 3]})
        for layer in layers
        for expert in range(0, layer.num_experts - 1, 2)
    ]
    return Plan(checkpoint_digest(source), (*drops, *widths))


def apply_mixed(source: Path, out: Path, shard_bytes: int) -> None:
    """Apply the mixed plan on one thread."""
    torch.set_num_threads(1)
    apply_plan(mixed_plan(source), source, out, shard_bytes=shard_bytes, progress=False)


def apply_interrupted(source: Path, out: Path, shard_bytes: int, queue: Queue[str]) -> None:
    """Apply the mixed plan and tell what an interrupt says."""
    try:
        apply_mixed(source, out, shard_bytes)
    except KeyboardInterrupt as interrupt:
        queue.put("\n".join(interrupt.__notes__))


def apply_with_small_files_only(source: Path, out: Path, largest_bytes: int, queue: Queue[str]) -> None:
    """Apply where no file may become larger than so many bytes, as under a quota; tell the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, resource.RLIM_INFINITY))
    try:
        apply_mixed(source, out, 1_000_000)
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")
    else:
        queue.put("no error")


def measure(source: Path, out: Path, queue: Queue[tuple[int, int]]) -> None:
    """Bytes of the result and how much the process grew while it was made."""
    plan = mixed_plan(source)
    num_bytes = planned_num_bytes(plan, source)
    # Forget the peak of the imports and of the process this one was forked from.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    apply_plan(plan, source, out, shard_bytes=100_000_000, progress=False)
    queue.put((num_bytes, _peak_bytes() - before))


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
