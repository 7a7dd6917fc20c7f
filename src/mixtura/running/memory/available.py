"""How much more memory this process can take, on the machine and under the limit of a container."""

from __future__ import annotations

import psutil

from mixtura.machine.control_groups import memory_left


def available_bytes() -> int:
    """Memory this process can still take: of the machine, or of the control groups that limit it."""
    left, available = memory_left(), int(psutil.virtual_memory().available)
    return available if left is None else min(available, left)
