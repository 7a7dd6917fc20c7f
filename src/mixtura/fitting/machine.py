"""What this machine reads: files, and weights as the experts' kernels read them."""

from __future__ import annotations

import os
import time
from pathlib import Path

_READ_BYTES = 64 * 2**20
_PIECE_BYTES = 2**22
_REPEATS = 2


def disk_speed(file: Path) -> float:
    """Bytes of a file read per second, past the page cache where the system allows that.

    The best of two tries: another process at the same disk is not a property of the disk.
    """
    return max(_read_once(file) for _ in range(_REPEATS))


def _read_once(file: Path) -> float:
    size = min(file.stat().st_size, _READ_BYTES)
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        left = size
        while left > 0 and (piece := opened.read(min(left, _PIECE_BYTES))):
            left -= len(piece)
        return max(size, 1) / max(time.perf_counter() - start, 1e-9)
