"""`mixtura verify`, and the options for running in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import run_mixtura, save_tiny

from mixtura.running.verifying import _compared


def test_a_model_is_the_same(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    done = run_mixtura("verify", model, "--memory", "8GiB", "--tokens", "16", "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["is_equal"]
    assert found["num_passes"] == 3 * (1 + 3)
    assert found["num_logits"] == (1 + 3 + 1) * 4 * 64
    assert found["experts"]["demanded_bytes"] > 0


def test_a_difference_is_found_and_named() -> None:
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    other[1, 2] = 0.5
    passes = [("the prompt", one), ("token 1", one), ("token 2", one)]
    found = _compared(passes, iter([("", one.clone()), ("", other), ("", other)]), {})
    assert not found.is_equal
    assert (found.first_difference, found.largest_difference) == ("token 1", 0.5)
    # Equal numbers, other bits.
    assert not _compared(passes[:1], iter([("", -one)]), {}).is_equal
    nan = torch.full((2, 4), float("nan"))
    assert _compared([("", nan)], iter([("", nan.clone())]), {}).is_equal


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--memory", "much"), 2, "is not a size"),
        (("--memory", "8GiB", "--cache", "lro"), 2, "did you mean 'lru'"),
        (("--memory", "8GiB", "--cache", "belady"), 2, "reads the future"),
        (("--memory", "8GiB", "--prefetch", "next_gat"), 2, "did you mean 'next_gate'"),
        (("--memory", "1MiB"), 3, "the smallest memory is"),
        (("--cache", "lfu"), 2, "give --memory, too"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    model = str(save_tiny(tmp_path / "model"))
    done = run_mixtura("generate", model, "abc", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
