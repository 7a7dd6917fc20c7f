"""What is on its way from disk to memory, and who waits for it how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, final

from mixtura.errors import CheckpointError

# How long a disk may take for what is waited for, before whoever waits is told that it does not answer.
PATIENCE_S: Final = 60.0


@final
class Load:
    """Ranges on their way to memory.

    Args:
        num_bytes: of all of them.
        patience_s: seconds after which waiting for them is given up.
    """

    def __init__(self, num_bytes: int, patience_s: float = PATIENCE_S) -> None:
        self.num_bytes = num_bytes
        self.error: BaseException | None = None
        self._patience_s = patience_s
        self._left = 0
        self._num_writing = 0
        self._is_given_up = False
        self._lock = threading.Condition()
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
            CheckpointError: it could not be read, or not for so long that it is given up.
        """
        if not self._done.wait(self._patience_s):
            self.give_up(
                CheckpointError(
                    f"the disk has not given an expert of {self.num_bytes} bytes for {self._patience_s:g} s; "
                    "see whether it answers at all, and ask again"
                )
            )
        if self.error is not None:
            raise self.error

    def give_up(self, error: BaseException) -> None:
        """Let nothing more be written to memory, whatever is still read."""
        with self._lock:
            if self._done.is_set():
                return
            self._is_given_up = True
            self.error = self.error or error
            self._lock.wait_for(lambda: not self._num_writing)
            self._done.set()

    def begin(self, num_parts: int) -> None:
        """Expect so many calls of `finish`."""
        self._left = num_parts
        if not num_parts:
            self._done.set()

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Whether memory may be written to, which then nobody gives to others meanwhile."""
        with self._lock:
            wanted = not self._is_given_up
            self._num_writing += wanted
        try:
            yield wanted
        finally:
            with self._lock:
                self._num_writing -= wanted
                self._lock.notify_all()

    def finish(self, error: BaseException | None) -> None:
        """One part is there, or cannot be had."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if not self._left:
                self._done.set()
