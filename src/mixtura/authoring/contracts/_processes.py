"""Processes for checks that need some of their own, kept for the next method: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_POOLS: dict[int, ProcessPoolExecutor] = {}


def run_apart(work: Callable[..., Any], num_processes: int, *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns in each of as many processes at once, by rank.

    Raises whatever the first process that fails raises; the processes are then not used again.
    """
    pool = _POOLS.get(num_processes)
    if pool is None:
        pool = _POOLS[num_processes] = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
    # Each waits for the others, so no process can have taken the work of two.
    waiting = [pool.submit(work, rank, *arguments) for rank in range(num_processes)]
    try:
        return [one.result() for one in waiting]
    except BaseException:
        del _POOLS[num_processes]
        pool.shutdown(wait=False, cancel_futures=True)
        raise
