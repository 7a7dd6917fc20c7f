"""A model several times larger than the memory there is, under a real limit that counts the page cache."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from memory_limit import limited
from tiny_checkpoints import tiny_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixtura.data.tasks import sample

pytestmark = pytest.mark.slow

FIT_LIMIT_BYTES = 768 << 20
COMPRESS_LIMIT_BYTES = 640 << 20
MAIN = [sys.executable, "-c", "from mixtura.cli import main; main()"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 2.4 GB in float32, so that it has large files and not too many weights."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
    place = tmp_path_factory.mktemp("large")
    model.save_pretrained(place, max_shard_size="300MB")
    tiny_tokenizer().save_pretrained(place)
    del model
    assert sum(path.stat().st_size for path in place.glob("*.safetensors")) > 3 * FIT_LIMIT_BYTES
    yield place
    # pytest would keep it for three runs.
    shutil.rmtree(place)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(task.prompt + task.completion for task in sample("training", 4)))
    return file


def test_fits_a_model_three_times_larger_than_the_limit(large: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--model-memory", "120MB", "--text", str(text), "--time", "1s", "--json", "--out", str(out)]
    with limited(FIT_LIMIT_BYTES) as run:
        done = run([*MAIN, "fit", str(large), *options])
        peak = run.peak_bytes()
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["accounted_bytes"] <= 120_000_000
    assert told["kl"] < 1
    assert peak <= FIT_LIMIT_BYTES


def test_compresses_a_model_three_times_larger_than_the_limit(
    large: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    methods = ["--prune", "reap", "--keep", "0.5", "--quantize", "gptq", "--bits", "2"]
    options = ["--text", str(text), "--tokens", "512", "--json", "--out", str(out)]
    with limited(COMPRESS_LIMIT_BYTES) as run:
        done = run([*MAIN, "compress", str(large), *methods, *options])
        peak = run.peak_bytes()
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["bytes_after"] < told["bytes_before"] / 15
    assert told["quality"]["kl"] < 5
    assert peak <= COMPRESS_LIMIT_BYTES
