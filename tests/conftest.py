"""Shared by every test: its presence puts this folder on the path, so that `families` can be imported."""

from __future__ import annotations

import os
import signal
from importlib import import_module

from selection import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side with as many threads each as there are cores would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# jaxtyping's hook has everything that is imported while a module of mixtura is, libraries too, compiled anew
# instead of taken from where compiled code is kept. So what takes longest is imported before.
for library in ("torch", "transformers.modeling_utils", "accelerate", "peft", "scipy.optimize", "hypothesis"):
    import_module(library)
# A shell that starts the tests in the background makes them and their children deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Looking for doctests, pytest would import these a second time under a name that is taken.
# The plugin of `make sanitize` needs kernels that only that builds.
collect_ignore_glob = ["*conftest.py", "*sanitized.py"]
