"""How fast this machine reads memory: what bounds every token that is generated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import final

import torch

from mixtura.kernels.compiled import native, num_threads

_NUM_BYTES = 512 * 2**20


@final
class MemoryReader:
    """Reads memory far larger than any cache, pass after pass, with the kernels' threads.

    Args:
        num_bytes: bytes that one pass reads; where a cache holds them it is the cache that is measured.
    """

    def __init__(self, num_bytes: int = _NUM_BYTES) -> None:
        self._array = torch.ones(num_bytes, dtype=torch.uint8)
        # The first pass starts the threads and finds the pages.
        self.bytes_per_second()

    def bytes_per_second(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """The rate of one pass, now, by a clock of seconds."""
        array, extension = self._array, native()
        start = clock()
        if extension is None:
            array.view(torch.int64).sum()
        else:
            extension.read_all(array.data_ptr(), array.nbytes, num_threads())
        return array.nbytes / (clock() - start)


def memory_bytes_per_second(num_bytes: int = _NUM_BYTES, repeats: int = 4) -> float:
    """The rate at which the kernels' threads read memory, the best of a few passes.

    Args:
        num_bytes: bytes that one pass reads; far more than any cache holds, or it measures a cache.
        repeats: passes.
    """
    reader = MemoryReader(num_bytes)
    return max(reader.bytes_per_second() for _ in range(repeats))
