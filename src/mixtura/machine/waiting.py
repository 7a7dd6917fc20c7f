"""How threads that work on one thing wait for each other."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Let PyTorch's threads sleep while they wait for each other; call it before PyTorch is imported.

    A thread of OpenMP that waits for the others spins for milliseconds. Where other processes want the same
    processors, it holds up those it waits for: with two beside, observing took four to ten times as long.
    What the user says in ``OMP_WAIT_POLICY`` holds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
