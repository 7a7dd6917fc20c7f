"""The view, dropping, masking and the experts backend on every family; a handful in the quick set."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import family_checks as checks
import pytest
import transformers
from families import FAMILIES, VARIANTS
from transformers.integrations import moe

# Per-expert matrices on disk, interleaved with biases, groups with a bias, per-expert scales, an
# extra class of the router.
QUICK = ("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "zaya")
ALL = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
    for family in (*FAMILIES, *VARIANTS)
]
RUNNABLE = [param for param in ALL if param.values[0] not in VARIANTS]


@pytest.mark.slow
def test_every_family_is_found() -> None:
    """Reading the sources finds each family of which transformers itself has wrapped an experts class."""
    wrapped = set()
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "xperts" not in file.read_text(encoding="utf-8"):
            continue
        module = import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        own = [one for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__]
        if any(runs_by_implementation(one) for one in own):
            wrapped.add(file.parent.name)
    assert wrapped == set(FAMILIES)


def runs_by_implementation(cls: object) -> bool:
    """Whether transformers chooses how the experts of a class run."""
    code = getattr(getattr(cls, "forward", None), "__code__", None)
    return code is not None and code.co_filename == moe.__file__


@pytest.mark.parametrize("family", ALL)
def test_view_of_a_model_in_memory(family: str) -> None:
    checks.check_view_memory(family)


@pytest.mark.parametrize("family", ALL)
def test_view_of_a_checkpoint_equals_the_model(family: str, tmp_path: Path) -> None:
    checks.check_view_disk(family, tmp_path)


@pytest.mark.parametrize("family", RUNNABLE)
def test_dropping_equals_masking(family: str) -> None:
    checks.check_prune_equals_mask(family)


@pytest.mark.parametrize("family", RUNNABLE)
def test_experts_backend_equals_eager(family: str) -> None:
    checks.check_backend(family)


@pytest.mark.parametrize("family", [param for param in RUNNABLE if param.values[0] != "deepseek_v4"])
def test_pruned_model_saves_as_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    checks.check_save_reload(family, tmp_path)


@pytest.mark.parametrize("family", [param for param in RUNNABLE if param.values[0] != "deepseek_v4"])
def test_checkpoint_edited_on_disk_is_the_model_pruned_in_memory(family: str, tmp_path: Path) -> None:
    checks.check_edits(family, tmp_path)
