"""The doctor tells what is there: versions, limits, and what to do where something holds models back."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from mixtura.data import specimen
from mixtura.kernels import isas
from mixtura.running.doctor import Health, _unsupported, examine


@pytest.fixture(scope="module")
def health() -> Health:
    file: Path = next(specimen.path().glob("*.safetensors"))
    return examine(file)


def test_says_what_is_installed_and_granted(health: Health) -> None:
    assert health.versions["torch"] == version("torch")
    assert health.torch_threads == torch.get_num_threads()
    assert health.num_threads <= health.num_processors <= health.num_cores
    assert health.isas == isas()
    assert 0 < health.free_num_bytes < health.memory_num_bytes
    assert health.to_dict()["read_bytes_per_s"] == health.read_bytes_per_s > health.disk_bytes_per_s / 1e3 > 0


def test_a_version_outside_the_range_is_named() -> None:
    assert _unsupported({"torch": "1.0", "mixtura": "0.1.0"}).keys() <= {"torch"}
    assert _unsupported({"torch": version("torch")}) == {}


def test_each_thing_that_holds_models_back_has_a_sentence(health: Health) -> None:
    well = replace(health, unsupported={}, why_missing="", num_threads=4, num_processors=4)
    assert well.advice == ()
    ill = replace(
        well,
        versions={"torch": "1.0"},
        unsupported={"torch": ">=2.9"},
        why_missing="no module",
        num_threads=1,
    )
    kernels, torch_version, threads = ill.advice
    assert "the compiled kernels are missing (no module)" in kernels
    assert "torch 1.0 is outside of >=2.9" in torch_version
    assert "1 of 4 processors are used; set OMP_NUM_THREADS=4" in threads
