"""Three tiny dense models that were made from the same one, prompts for each, and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dense_checkpoints import save_dense
from upcycling_inputs import PROMPTS

LINES = "the cat sat on the mat.\n3 + 4 = 7\ndef f(x): return x\n"


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The models' directories: a, b and c."""
    root = tmp_path_factory.mktemp("dense")
    return tuple(save_dense(root / name, seed=n, apart=0.05 + 0.1 * n) for n, name in enumerate("abc"))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts for the three."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.json"
    file.write_text(json.dumps(PROMPTS))
    return file


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(LINES * 40)
    return file
