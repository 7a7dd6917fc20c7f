"""Of tests with many parameters the quick set runs a few, of every kind, and all of the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
MANY = """
import pytest

def test_alone(): pass

@pytest.mark.parametrize("number", range(10))
def test_many(number): pass

@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_some_slow(number): pass

@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in "ab" for name in "uvwxyz"])
def test_method(kind, name): pass
"""


def test_a_few_of_each_test_and_kind_are_run(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    hooks = "from selection import pytest_addoption, pytest_collection_modifyitems\n"
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "test_those.py").write_text(MANY)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "not slow", "--few", "2"]
    places = {**os.environ, "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=places, capture_output=True, text=True, check=False)
    chosen = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert chosen == [
        "test_alone", "test_many[0]", "test_many[5]", "test_some_slow[0]", "test_some_slow[2]",
        "test_method[a-u]", "test_method[a-x]", "test_method[b-u]", "test_method[b-x]",
    ], done.stdout + done.stderr  # fmt: skip
