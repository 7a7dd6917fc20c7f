"""Making the resident memory of this process what it uses, and reading it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

from mixtura.machine.waiting import wait_asleep

# PyTorch keeps a compiled kernel, about 0.6 MiB, for every shape of a bfloat16 product that it has seen,
# up to a thousand, in two caches. Generating makes new shapes all the time: rows of a chunk that reach
# an expert, attention over one more token.
NUM_KERNELS = 32
KERNEL_CACHE_BYTES = NUM_KERNELS * 600 * 1024
_KERNEL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(NUM_KERNELS), "LRU_CACHE_CAPACITY": "1"}

# glibc's names for options of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MMAP_BYTES = 1 << 18


def settle(mmap_bytes: int = _MMAP_BYTES) -> None:
    """Make this process a good neighbour from now on: little memory beyond what is in use, no spinning.

    Call it before PyTorch is used for the first time: some of it is read from the environment then.
    Freed tensors of ``mmap_bytes`` or more go back to the system at once, and compiled kernels are kept
    for a few shapes instead of a thousand. Where the C library is not glibc only the latter holds. Threads
    that wait sleep (`mixtura.machine.waiting`).

    Args:
        mmap_bytes: smaller tensors are kept for reuse, up to four times this many bytes. Every tensor
            above it costs fresh pages, which took a quarter of the time of a fit at 256 KiB.
    """
    wait_asleep()
    for name, value in _KERNEL_CACHE.items():
        os.environ.setdefault(name, value)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Given once, a threshold no longer grows with the sizes that are freed.
        mallopt(_M_MMAP_THRESHOLD, mmap_bytes)
        mallopt(_M_TRIM_THRESHOLD, 4 * mmap_bytes)
        mallopt(_M_ARENA_MAX, 1)


def release() -> None:
    """Give memory that is free back to the system, where the C library is glibc."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS") or _most_resident()


def peak_resident_bytes() -> int:
    """The most resident memory this process has had."""
    status = _status_bytes("VmHWM")
    if status is not None:
        # The kernel counts the peak a little later than what is resident.
        return max(status, resident_bytes())
    return _most_resident()


def _most_resident() -> int:
    """The peak as every Unix tells it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int | None:
    """A size in Linux's account of this process; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
