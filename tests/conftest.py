"""Shared by every test: its presence puts this folder on the path, so that `families` can be imported."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side with as many threads each as there are cores would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background makes them and their children deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Looking for doctests, pytest would import these a second time under a name that is taken.
# The plugin of `make sanitize` needs kernels that only that builds.
collect_ignore_glob = ["*conftest.py", "*sanitized.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that are slow throughout, so that the last that a worker takes is not a long one."""
    every = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] / every[item.path])
