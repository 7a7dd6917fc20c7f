"""How fast this machine reads memory: what bounds every token that is generated."""

from __future__ import annotations

import time

import torch

from mixtura.kernels.compiled import native, num_threads

_NUM_BYTES = 512 * 2**20


def memory_bytes_per_second(num_bytes: int = _NUM_BYTES, repeats: int = 4) -> float:
    """The rate at which the kernels' threads read memory, the best of a few passes.

    Args:
        num_bytes: bytes that one pass reads; far more than any cache holds, or it measures a cache.
        repeats: passes.
    """
    array = torch.ones(num_bytes, dtype=torch.uint8)
    extension = native()

    def read() -> object:
        if extension is None:
            return array.view(torch.int64).sum()
        return extension.read_all(array.data_ptr(), array.nbytes, num_threads())

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds[1:])
