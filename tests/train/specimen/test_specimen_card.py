"""The card's words around its figures, and the shipped model behind `path()`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtura.data.specimen import path
from mixtura.errors import CheckpointError
from mixtura.train.specimen import card
from mixtura.train.specimen.card_text import card_text, table
from mixtura.train.specimen.measure import load_by_layer, specialisation


def figures() -> dict[str, Any]:
    """Figures of the card's shape, with values that are easy to find again in its text."""
    import torch

    shares = torch.full((2, 3, 4), 0.25, dtype=torch.float64)
    values = {
        "bytes": 1000.0,
        "documents": 2.0,
        "model": 1.234,
        "token_5_gram": 2.345,
        "byte_5_gram": 3.456,
        "xz_alone": 4.567,
        "xz_primed": 5.678,
    }
    return {
        "training": {
            "seed": 1,
            "steps": 100,
            "decay_start": 80,
            "decay_steps": 20,
            "tokens": 2_000_000,
            "hours": 1.5,
            "text_sha256": "abc",
            "hardware": "2 cores, a processor",
            "python": "3.11",
            "torch": "2.13",
            "transformers": "5.23",
            "date": "2026-11-22",
        },
        "checkpoint_bytes": 42_000_000,
        "parameters": 21_000_000,
        "compression": {"code": values},
        "accuracy": {"addition": {"en": {"correct": 3, "total": 4, "chance": 0.25}}},
        "load": load_by_layer(shares),
        "specialisation": specialisation(shares),
        "text_warning": None,
        "minutes_to_measure": 2.0,
    }


def test_every_figure_is_in_the_card() -> None:
    text = card_text(figures())
    for cell in ("1.234", "2.345", "3.456", "4.567", "5.678", "| addition | 75 % | 75 % | 4 | 25 % |"):
        assert cell in text
    assert "| 0 | 1.00 | 1.00 | 1.000 | 0 |" in text
    assert "decayed over the last 20 of them" in text
    assert "2.0 million" in text


def test_a_text_that_changed_is_said() -> None:
    changed = figures() | {"text_warning": "3 held-out texts differ"}
    assert "Note: 3 held-out texts differ." in card_text(changed)


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_directory_without_training_facts_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"training\.json is missing"):
        card.measure_card(tmp_path)
    command = [sys.executable, "-m", "mixtura.train.specimen.card", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr


def test_the_shipped_card_says_what_its_figures_say() -> None:
    figures = json.loads((path() / "card.json").read_text())
    assert (path() / "README.md").read_text() == card_text(figures)
    assert sum(file.stat().st_size for file in path().iterdir()) <= 45_000_000


def test_the_shipped_model_is_good_enough_to_lose_quality() -> None:
    figures = json.loads((path() / "card.json").read_text())
    code = figures["compression"]["code"]
    assert code["model"] < 0.9 * code["xz_alone"]
    for task in ("addition", "subtraction"):
        cells = figures["accuracy"][task].values()
        assert sum(cell["correct"] for cell in cells) > 0.8 * sum(cell["total"] for cell in cells)
    assert all(row["dead"] == 0 for row in figures["load"])
