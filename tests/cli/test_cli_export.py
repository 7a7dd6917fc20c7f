"""`mixtura export`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import run_mixtura, save_tiny

pytest.importorskip("gguf", reason="the package gguf is not installed; it is in mixtura[gguf]")


def test_the_specimen_is_written_and_what_it_takes_is_said(tmp_path: Path) -> None:
    out = tmp_path / "specimen.gguf"
    done = run_mixtura("export", "--out", str(out), "--type", "q8_0", "--no-calibrate")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp's qwen3moe" in done.stdout
    assert "q8_0" in done.stdout
    assert out.read_bytes()[:4] == b"GGUF"
    again = run_mixtura("export", "--out", str(out))
    assert again.returncode == 2
    assert "never overwritten" in again.stderr


def test_json_is_one_object(tmp_path: Path) -> None:
    out = tmp_path / "specimen.gguf"
    done = run_mixtura("export", "specimen", "--out", str(out), "--json")
    told = json.loads(done.stdout)
    assert told["num_bytes"] == out.stat().st_size
    assert set(told["bytes_by_type"]) == {"bf16", "f32"}
    assert told["calibrated"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--type", "q4k"), "did you mean"),
        (("--format", "onnx"), "there are: compressed-tensors, gguf"),
        (("--type", "blk.9.*=q8_0"), "no tensor of this model"),
    ],
)
def test_a_refusal_is_one_sentence_and_writes_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = run_mixtura("export", "--out", str(tmp_path / "x.gguf"), *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_for_llama_cpp_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3_moe")
    done = run_mixtura("export", str(source), "--out", str(tmp_path / "x.gguf"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
