"""Decoders say the same of a model that runs from memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mixtura
from mixtura.authoring.contracts._core import subject
from mixtura.authoring.contracts._decoded import PROMPTS, model, needed_by, tokenizer
from mixtura.methods import own_names
from mixtura.running.decoders.entry import decode
from mixtura.running.tiers.opening import Wish, tiers_of


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("decoded")
    model().save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def whole(path: Path) -> Any:
    return mixtura.load(path)


@pytest.mark.parametrize("name", own_names("decoders"))
def test_the_same_from_disk(name: str, path: Path, whole: Any) -> None:
    method = subject("decoders", name)
    options = {"max_new_tokens": 8, "seed": 3, **needed_by(method)}
    tiered = mixtura.load(path, memory=Wish(pool_slots=5))
    expected, found = (
        decode(one, tokenizer(), PROMPTS[0], method.create(), **options) for one in (whole, tiered)
    )
    assert found.branches == expected.branches
    assert found.cost == expected.cost
    tiers = tiers_of(tiered)
    assert tiers is not None
    # Where all that may be said is said already, nothing runs.
    assert (tiers.statistics.demanded_bytes > 0) == (found.cost.num_passes > 0)
