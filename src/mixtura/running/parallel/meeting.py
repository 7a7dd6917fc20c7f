"""Processes that meet through a file, and how they part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=120)
# Groups that were left. Who frees a group waits for Gloo's threads, and they may wait for Python's lock to
# let go of a tensor: whoever is last must not hold it. A reducer that goes later than the group does.
_LEFT: list[Any] = []


@contextmanager
def joined(rank: int, size: int, folder: str | Path) -> Iterator[None]:
    """Be one of several processes of one thread, in touch by Gloo; the end waits for the others.

    After an error nothing is waited for: the process is to end.

    Args:
        rank: This one's number.
        size: How many there are.
        folder: An empty directory that all of them see.
    """
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    store = FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    yield
    leave()


def leave() -> None:
    """Part from the other processes when all are done, if there are any; the last thing that one does.

    A process that is still in touch is ended by what another leaves behind that stops before it.
    """
    if dist.is_available() and dist.is_initialized():
        _LEFT.extend(dist.distributed_c10d._world.pg_map)
        dist.barrier()
        dist.destroy_process_group()
