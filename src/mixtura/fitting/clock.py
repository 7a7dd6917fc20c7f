"""The time a fit was given, and a pass through the model that looks at it layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from mixtura.fitting.search import OutOfTimeError
from mixtura.report.units import format_seconds
from mixtura.running.stream import Streamed

Notify = Callable[[str], None]

# A line each time would fill a log; a pass over a large model takes minutes.
_BETWEEN_LINES_S = 10.0


@final
@dataclass(frozen=True, slots=True)
class Clock:
    """When observing began, in `time.monotonic` seconds, and for how long a fit may observe and search."""

    started: float
    limit_s: float

    @property
    def elapsed_s(self) -> float:
        """Seconds since observing began."""
        return time.monotonic() - self.started

    @property
    def left_s(self) -> float:
        """Seconds until the time is over; negative afterwards."""
        return self.limit_s - self.elapsed_s

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.left_s < 0


@final
class Progress:
    """Says how far a pass of several layers has come, and what is left of it at this pace."""

    def __init__(self, what: str, total: int, notify: Notify, unit: str = "layer") -> None:
        self._what = what
        self._total = total
        self._notify = notify
        self._unit = unit
        self._started = self._said = time.monotonic()
        self.done = 0

    @property
    def total(self) -> int:
        """Layers of the pass, counted once for each batch of text."""
        return self._total

    def advance(self) -> None:
        """One layer is done."""
        self.done += 1
        now = time.monotonic()
        if now - self._said >= _BETWEEN_LINES_S and self.done < self._total:
            self._said = now
            left = (now - self._started) / self.done * (self._total - self.done)
            self._notify(
                f"{self._what}: {self._unit} {self.done} of {self._total}, about {format_seconds(left)} left"
            )


@contextmanager
def watched(streamed: Streamed, progress: Progress, clock: Clock | None) -> Iterator[None]:
    """Count the MoE layers of a streamed model as they finish, and stop between them when time is over.

    Args:
        streamed: the model that runs meanwhile.
        progress: told of each layer.
        clock: looked at after each layer; `None` for a pass that is needed however long it takes.

    Raises:
        OutOfTimeError: the time was over before the last layer.
    """

    def finished(*_: Any) -> None:
        progress.advance()
        if clock is not None and clock.is_over and progress.done < progress.total:
            raise OutOfTimeError

    modules = [streamed.model.get_submodule(layer.name) for layer in streamed.view.layers]
    handles = [module.register_forward_hook(finished) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
