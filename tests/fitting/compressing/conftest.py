"""A tiny model with its tokenizer, which no test may change, and text of its characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

from mixtura.data.tasks import sample


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("compressing") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressing_text") / "text.txt"
    path.write_text("\n".join(task.prompt + task.completion for task in sample("training", 6)))
    return path
