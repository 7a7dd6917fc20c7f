"""Reading ranges of files past the system's page cache, by threads that wait for the disk.

What a model reads again and again must not stay twice in memory: once where the experts lie, and once in the
page cache, which control groups count as well. So files are opened for direct reads (``O_DIRECT``); where a
file system has none, pages are given up after each read. Direct reads begin and end at whole blocks, so each
thread has a buffer for them and copies what was asked for out of it; the copy takes a tenth of the time. It
also keeps a read that comes after all from writing to memory that another expert has got meanwhile.

What is read twice must be the same twice: the digest of each piece is kept from its first read on.
"""

from __future__ import annotations

import itertools
import mmap
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import PriorityQueue
from typing import Any, Final, NamedTuple, final

import numpy as np
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.running.tiers.files import BLOCK_BYTES, DirectFile, digest_of
from mixtura.running.tiers.loads import PATIENCE_S, Load

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
        patience_s: seconds after which a read that is waited for is given up.
    """

    def __init__(self, num_threads: int = NUM_THREADS, patience_s: float = PATIENCE_S) -> None:
        self._work = _Work(num_threads)
        self._patience_s = patience_s
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
        return num_threads * (CHUNK_BYTES + 2 * BLOCK_BYTES)

    def open(self, files: Iterable[Path]) -> None:
        """Open files now, so that one that takes the place of another later is not taken for it.

        Raises:
            CheckpointError: one cannot be opened.
        """
        for file in sorted({*files}):
            try:
                self._work.file(file)
            except OSError as error:
                raise CheckpointError(f"cannot read {file}: {error.strerror}") from None

    def read(self, ranges: Sequence[Range], priority: int = NOW) -> Load:
        """Begin to read; ``LATER`` lets everything that is asked for ``NOW`` go first."""
        load = Load(sum(one.target.numel() for one in ranges), self._patience_s)
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
        self._files: dict[Path, DirectFile] = {}
        self._digests: dict[tuple[Path, int, int], int] = {}
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Read one chunk after the other."""
        buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES + 2 * BLOCK_BYTES))
        while True:
            _, _, chunk = self.jobs.get()
            if chunk is None:
                self._leave()
                return
            if chunk.load.is_done or not chunk.claim():
                continue
            error: BaseException | None = None
            try:
                self._read(chunk, buffer)
            except BaseException as raised:  # Whoever waits is told.
                error = raised
            chunk.load.finish(error)
            del chunk

    def _read(self, chunk: _Chunk, buffer: memoryview) -> None:
        first = chunk.start // BLOCK_BYTES * BLOCK_BYTES
        last = -(-chunk.stop // BLOCK_BYTES) * BLOCK_BYTES
        try:
            count = self.file(chunk.file).read(buffer[: last - first], first)
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
        self._check(chunk, source[: last - first][:count], first)
        with chunk.load.writing() as is_wanted:
            for offset, target in chunk.parts if is_wanted else ():
                start = offset - first
                target[:] = source[start : start + len(target)]

    def _check(self, chunk: _Chunk, read: np.ndarray[Any, np.dtype[np.uint8]], first: int) -> None:
        """Compare a piece with what it was when it was read before."""
        # What lies beyond the end of the file is not read the same way everywhere.
        piece = chunk.file, first, chunk.stop
        found = digest_of(read[: chunk.stop - first])
        if self._digests.setdefault(piece, found) != found:
            raise CheckpointError(
                f"{chunk.file} is not what it was: bytes {first} to {chunk.stop} have changed since they "
                "were first read; put the file back as it was, or load the model again"
            )

    def file(self, file: Path) -> DirectFile:
        """A file, opened once."""
        found = self._files.get(file)
        if found is None:
            # Opening can stall, which must not keep others from files that are open.
            opened = DirectFile(file)
            with self._lock:
                found = self._files.setdefault(file, opened)
            if found is not opened:
                opened.close()
        return found

    def _leave(self) -> None:
        """The last thread closes all files."""
        with self._lock:
            self._num_threads -= 1
            for file in self._files.values() if not self._num_threads else ():
                file.close()


def _stop(work: _Work, num_threads: int) -> None:
    for _ in range(num_threads):
        work.jobs.put((_AT_LAST, next(work.numbers), None))


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
