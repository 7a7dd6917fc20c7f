"""What the engine counts while it serves: plain numbers that pages and metrics are made of."""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

# Upper bounds of the histograms' buckets, in seconds.
FIRST_TOKEN_BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# Measurements from which percentiles of the recent past are taken.
_RECENT: Final = 2048
_RATE_WINDOW_S: Final = 10.0


@final
class Histogram:
    """Counts by upper bound, as Prometheus has them, and the last values for percentiles."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum_s = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, seconds: float) -> None:
        """Count one measurement."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds
        self._recent.append(seconds)

    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bounds as text, and how many lie at or under each."""
        total, made = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            made.append((bound, float(total)))
        return made

    def percentile(self, share: float) -> float | None:
        """Of the last measurements, in seconds; None where there are none."""
        values = sorted(self._recent)
        return values[min(len(values) - 1, int(share * len(values)))] if values else None


@final
@dataclass(slots=True)
class Counts:
    """Sums since the engine began; the engine's thread writes, others read.

    Attributes:
        prompt_tokens: tokens of prompts that were read.
        cached_tokens: tokens of prompts that were not read again.
        new_tokens: tokens of answers.
        finished: requests by how they ended: ``stop``, ``length``, ``cancelled``, ``failed``, ``refused``.
        steps: steps of running texts.
        step_rows: texts in them, all told.
        first_token: from the request to its first token.
        between: from one token to the next.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "failed", "refused"), 0)
    )
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    between: Histogram = field(default_factory=lambda: Histogram(BETWEEN_BOUNDS))
    started_at: float = field(default_factory=time.time)
    _times: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=4096))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def saw_tokens(self, num: int) -> None:
        """New tokens of answers came."""
        self.new_tokens += num
        with self._lock:
            self._times.append((time.perf_counter(), num))

    def ended(self, how: str) -> None:
        """A request ended."""
        with self._lock:
            self.finished[how] += 1

    def tokens_per_second(self) -> float:
        """New tokens of all answers in a second, over the last ten."""
        since = time.perf_counter() - _RATE_WINDOW_S
        with self._lock:
            return sum(num for when, num in self._times if when >= since) / _RATE_WINDOW_S

    def latencies(self) -> dict[str, Any]:
        """Percentiles of the recent past in milliseconds, None where nothing was measured."""
        return {
            name: {
                label: None if (value := one.percentile(share)) is None else round(value * 1000, 2)
                for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
            }
            for name, one in (("first_token_ms", self.first_token), ("between_tokens_ms", self.between))
        }
