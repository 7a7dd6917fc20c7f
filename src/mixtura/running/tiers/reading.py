"""Reading ranges of files past the system's page cache, by threads that wait for the disk.

What a model reads again and again must not stay twice in memory: once where the experts lie, and once in the
page cache, which control groups count as well. So files are opened for direct reads (``O_DIRECT``); where a
file system has none, pages are given up after each read. Direct reads begin and end at whole blocks, so each
thread has a buffer for them and copies what was asked for out of it; the copy takes a tenth of the time.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from queue import PriorityQueue
from typing import Any, Final, NamedTuple, final

import numpy as np
from torch import Tensor

from mixtura.errors import CheckpointError

# Reads begin and end at multiples of this many bytes.
_BLOCK: Final = 4096
# Bytes of one read: large enough for the disk, small enough that several threads share an expert.
CHUNK_BYTES: Final = 2 << 20
NUM_THREADS: Final = 4
# Bytes between two ranges that are read along rather than apart.
_GAP: Final = 16 << 10
NOW, LATER = 0, 1
# What is on its way is read to its end first.
_AT_LAST: Final = 2


class Range(NamedTuple):
    """Bytes of a file and where they go, a tensor of bytes of that many."""

    file: Path
    offset: int
    target: Tensor


@final
class Load:
    """Ranges on their way to memory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.error: BaseException | None = None
        self._left = 0
        self._lock = threading.Lock()
        self._done = threading.Event()

    @staticmethod
    def failed() -> Load:
        """A load that never came to be."""
        load = Load(0)
        load.error = CheckpointError("an expert was not read to its end")
        load.begin(0)
        return load

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is still to be read."""
        return self._done.is_set()

    @property
    def is_here(self) -> bool:
        """Whether all of it is in memory."""
        return self._done.is_set() and self.error is None

    def wait(self) -> None:
        """Return when all is there.

        Raises:
            CheckpointError: it could not be read.
        """
        self._done.wait()
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        """Return when nothing more will be written to memory."""
        self._done.wait()

    def begin(self, num_parts: int) -> None:
        """Expect so many calls of `finish`."""
        self._left = num_parts
        if not num_parts:
            self._done.set()

    def finish(self, error: BaseException | None) -> None:
        """One part is there, or cannot be had."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if not self._left:
                self._done.set()


@final
class _Chunk:
    """Neighbouring bytes that are read at once; whoever claims it first does so."""

    def __init__(self, load: Load, file: Path, start: int) -> None:
        self.load = load
        self.file = file
        self.start = start
        self.stop = start
        self.parts: list[tuple[int, Any]] = []
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Whether nobody else reads it."""
        return self._claim.acquire(blocking=False)


@final
class Reader:
    """Threads that read ranges of files into memory.

    Args:
        num_threads: reads that are on their way together.
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._work = _Work(num_threads)
        self._threads = [
            threading.Thread(target=self._work.serve, name="mixtura-read", daemon=True)
            for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._waiting: dict[Load, list[_Chunk]] = {}
        weakref.finalize(self, _stop, self._work, num_threads)

    @staticmethod
    def buffer_bytes(num_threads: int = NUM_THREADS) -> int:
        """Memory that the threads' buffers take."""
        return num_threads * (CHUNK_BYTES + 2 * _BLOCK)

    def read(self, ranges: Sequence[Range], priority: int = NOW) -> Load:
        """Begin to read; ``LATER`` lets everything that is asked for ``NOW`` go first."""
        load = Load(sum(one.target.numel() for one in ranges))
        chunks = _chunks(ranges, load)
        load.begin(len(chunks))
        self._put(chunks, priority)
        if priority != NOW:
            self._waiting = {held: c for held, c in self._waiting.items() if not held.is_done}
            self._waiting[load] = chunks
        return load

    def hurry(self, load: Load) -> None:
        """What was asked for ``LATER`` is wanted now."""
        chunks = self._waiting.pop(load, None)
        if chunks and not load.is_done:
            self._put(chunks, NOW)

    def _put(self, chunks: Sequence[_Chunk], priority: int) -> None:
        for chunk in chunks:
            self._work.jobs.put((priority, next(self._work.numbers), chunk))


@final
class _Work:
    """What the threads share; it does not know the `Reader`, so that letting that go ends them."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self.jobs: PriorityQueue[tuple[int, int, _Chunk | None]] = PriorityQueue()
        self.numbers = itertools.count()
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Read one chunk after the other."""
        buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES + 2 * _BLOCK))
        while True:
            _, _, chunk = self.jobs.get()
            if chunk is None:
                self._leave()
                return
            if not chunk.claim():
                continue
            error: BaseException | None = None
            try:
                self._read(chunk, buffer)
            except BaseException as raised:  # Whoever waits is told.
                error = raised
            chunk.load.finish(error)
            del chunk

    def _read(self, chunk: _Chunk, buffer: memoryview) -> None:
        first = chunk.start // _BLOCK * _BLOCK
        last = -(-chunk.stop // _BLOCK) * _BLOCK
        try:
            count = self._file(chunk.file).read(buffer[: last - first], first)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {chunk.file}: {error.strerror}; the model's files must stay where they are "
                "while it runs from them"
            ) from None
        if count < chunk.stop - first:
            raise CheckpointError(
                f"{chunk.file} ended at byte {first + count}, before all of an expert was read; it was "
                "changed while the model ran from it: load the model again"
            )
        source = np.frombuffer(buffer, dtype=np.uint8)
        for offset, target in chunk.parts:
            start = offset - first
            target[:] = source[start : start + len(target)]

    def _file(self, file: Path) -> _File:
        with self._lock:
            if file not in self._files:
                self._files[file] = _File(file)
            return self._files[file]

    def _leave(self) -> None:
        """The last thread closes all files."""
        with self._lock:
            self._num_threads -= 1
            for file in self._files.values() if not self._num_threads else ():
                file.close()


def _stop(work: _Work, num_threads: int) -> None:
    for _ in range(num_threads):
        work.jobs.put((_AT_LAST, next(work.numbers), None))


@final
class _File:
    """One file, opened for direct reads where the system has them."""

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
            if not count or (self._is_direct and count % _BLOCK):
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


def _chunks(ranges: Sequence[Range], load: Load) -> list[_Chunk]:
    """Ranges in the pieces in which they are read, neighbours together."""
    made: list[_Chunk] = []
    for file, offset, target in sorted(ranges, key=lambda one: (str(one.file), one.offset)):
        values, done = target.numpy(), 0
        while done < len(values):
            at = offset + done
            last = made[-1] if made else None
            near = last is not None and last.file == file and last.stop <= at <= last.stop + _GAP
            if last is None or not near or at - last.start >= CHUNK_BYTES:
                last = _Chunk(load, file, at)
                made.append(last)
            count = min(len(values) - done, last.start + CHUNK_BYTES - at)
            last.parts.append((at, values[done : done + count]))
            last.stop = at + count
            done += count
    return made
