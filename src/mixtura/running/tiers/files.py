"""Files read past the page cache, and digests of what was read."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any, Final, final

import numpy as np

# Reads begin and end at multiples of this many bytes.
BLOCK_BYTES: Final = 4096
_WORD_BYTES: Final = 8


@final
class DirectFile:
    """One file, opened for direct reads where the system has them: at whole blocks of it and of memory."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        self._path = path
        self._flags = flags
        self._is_direct = hasattr(os, "O_DIRECT")
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError:
            # tmpfs, for one, has no direct reads.
            self._is_direct = False
            self._descriptor = os.open(path, flags)
        self._lock = threading.Lock()

    def read(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from an offset; returns how many bytes there were."""
        done = 0
        while done < len(view):
            count = self._read_some(view[done:], offset + done)
            done += count
            # A direct read ends within a block at the end of the file only.
            if not count or (self._is_direct and count % BLOCK_BYTES):
                break
        if not self._is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
        return done

    def _read_some(self, view: memoryview, offset: int) -> int:
        try:
            return self._positioned(view, offset)
        except OSError:
            if not self._is_direct:
                raise
        # Some file systems open a file for direct reads and then refuse them.
        with self._lock:
            if self._is_direct:
                self._is_direct = False
                self._descriptor = os.open(self._path, self._flags)
        return self._positioned(view, offset)

    def _positioned(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        # Threads would share the position of one descriptor.
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.readv(self._descriptor, [view])

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


def digest_of(values: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """A digest of bytes that begin at a whole block, at the speed of memory.

    Sums of words by column and by row of a table of blocks: any one word that changes shows, and so do blocks
    that change places; what is left over, and the sums themselves, are digested in full. It is for disks and
    mistakes, not against somebody who forges sums.

    >>> import numpy as np
    >>> values = np.zeros(9000, dtype=np.uint8)
    >>> other = values.copy()
    >>> other[5000] = 1
    >>> digest_of(values) == digest_of(values.copy()), digest_of(values) == digest_of(other)
    (True, False)
    """
    whole = len(values) // BLOCK_BYTES * BLOCK_BYTES
    words = values[:whole].view(np.uint64).reshape(-1, BLOCK_BYTES // _WORD_BYTES)
    made = hashlib.blake2b(values[whole:].tobytes(), digest_size=_WORD_BYTES)
    made.update(words.sum(axis=0).tobytes())
    made.update(words.sum(axis=1).tobytes())
    return int.from_bytes(made.digest(), "little")
