"""A quantizer that looks at all experts of a layer: what it is given, after drops and merges, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import run_mixtura, save_tiny

from mixtura import compress, load


def smooths(folder: Path, matrix: str) -> list[torch.Tensor]:
    """The scales of every expert's first or last matrix, by layer and expert."""
    held = load_file(folder / "model.safetensors")
    return [one.float() for name, one in sorted(held.items()) if "smooth" in name and matrix in name]


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_all_experts_of_a_layer_have_one_smoothing_or_none(family: str, text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    said = ["--quantize", "ea_quant", "--bits", "4", "--set", "quantize.group_size=16", "--tokens", "300"]
    said += ["--length", "64", "--text", str(text), "--out", str(tmp_path / "out")]
    done = run_mixtura("compress", str(source), *said)
    assert done.returncode == 0, done.stderr
    found = smooths(tmp_path / "out", "up")
    assert found
    used = {tuple(one.tolist()) for one in found if not bool(one.eq(1).all())}
    layers = load(source).config.get_text_config().num_hidden_layers
    assert 1 <= len(used) <= layers
    model = load(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.arange(5, 37)[None]).logits).all()


@pytest.mark.parametrize("reduced", [{"prune": "reap"}, {"merge": "m_smoe"}])
def test_experts_that_are_left_are_looked_at(
    reduced: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    made = compress(
        source, tmp_path / "out", **reduced, keep=0.5, quantize="ea_quant", text=text, tokens=300, length=64,
        measure=False,
    )  # fmt: skip
    again = compress(
        source, tmp_path / "again", **reduced, keep=0.5, quantize="ea_quant", text=text, tokens=300,
        length=64, measure=False,
    )  # fmt: skip
    assert made.bytes_after == again.bytes_after
    first, second = (load_file(one.out / "model.safetensors") for one in (made, again))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    assert smooths(made.out, "up")
