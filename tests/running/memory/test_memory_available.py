"""What is left of memory, under a limit and without one."""

from __future__ import annotations

import sys

import psutil
from memory_limit import limited

from mixtura.running.memory.available import available_bytes

PRINT = "from mixtura.running.memory.available import available_bytes; print(available_bytes())"
MIB = 1 << 20


def test_without_a_limit_it_is_at_most_what_the_machine_has() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_a_limit_is_seen() -> None:
    with limited(100 * MIB) as run:
        done = run([sys.executable, "-c", PRINT])
    assert done.returncode == 0, done.stderr
    # Python itself takes some of it.
    assert 50 * MIB < int(done.stdout) < 100 * MIB
