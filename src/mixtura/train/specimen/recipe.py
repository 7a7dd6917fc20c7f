"""The specimen's recipe: a configuration of `mixtura train`, in `recipe.yaml` beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mixtura.train.config import TrainConfig, read_config

RECIPE = Path(__file__).with_name("recipe.yaml")
VOCABULARY = 4096


@cache
def recipe() -> TrainConfig:
    """How the specimen is trained."""
    return read_config(RECIPE)


def changed(changes: Sequence[str]) -> TrainConfig:
    """The recipe with ``key=value`` changes, as ``mixtura train --set`` makes them."""
    return read_config(RECIPE, changes)
