"""One pass over text that records what really reaches a model's experts, as a `Trace`."""

from __future__ import annotations

from mixtura.running.observing.entry import observe
from mixtura.running.observing.passing import Observers, memory_digest

__all__ = ["Observers", "memory_digest", "observe"]
