"""How fast this machine reads a file from disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

_MOST_BYTES = 64 * 2**20
_PIECE = 2**22
_REPEATS = 2


def disk_bytes_per_second(path: Path, most_bytes: int = _MOST_BYTES) -> float:
    """The rate of reading a file in order, past what the system holds of it in memory where it lets one.

    The best of two tries: another process at the same disk is not a property of the disk. Where the system
    does not give up pages of a file when asked, the rate of its memory may be what is measured.

    Args:
        path: a file of the device in question, the larger the better.
        most_bytes: how much of it to read at most.

    Raises:
        OSError: the file cannot be read.
    """
    return max(_read_once(path, most_bytes) for _ in range(_REPEATS))


def _read_once(path: Path, most_bytes: int) -> float:
    size = min(path.stat().st_size, most_bytes)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(_PIECE))
        start = time.perf_counter()
        left = size
        while left > 0 and (read := file.readinto(buffer[: min(left, _PIECE)])):
            left -= read
        return max(size - left, 1) / max(time.perf_counter() - start, 1e-9)
