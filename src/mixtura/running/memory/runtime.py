"""The bare runtime's bytes, measured once for each installation and kept.

Two measurements differ by a few MiB. A fit that goes on must count with the number it began with, or
its budget, and with it its plan, would be another.
"""

from __future__ import annotations

import platform
import sys
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path

import torch

import mixtura
from mixtura.machine.kept import keep, read_kept
from mixtura.running.memory.measuring import runtime_bytes

_FILE = "runtime"


def known_runtime_bytes() -> int:
    """Bytes of a process with Python, PyTorch and transformers in use and no model."""
    key = _installation()
    known = read_kept(_FILE)
    if key not in known:
        known[key] = runtime_bytes()
        keep(_FILE, known)
    return int(known[key])


def _installation() -> str:
    """What the runtime's size depends on.

    All that is installed belongs to it, since transformers imports more where more is there; and
    mixtura's own files, since their number of version stays while they are worked on.
    """
    installed = sorted(f"{found.name} {found.version}" for found in distributions())
    package = Path(mixtura.__file__).parent
    own = sorted(f"{file.relative_to(package)} {file.stat().st_size}" for file in package.rglob("*.py"))
    digest = sha256("\n".join([*installed, *own]).encode()).hexdigest()[:16]
    python = f"python {platform.python_version()} {platform.machine()} in {sys.prefix}"
    return f"mixtura {mixtura.__version__}, {python}, installed {digest}, {torch.get_num_threads()} threads"
