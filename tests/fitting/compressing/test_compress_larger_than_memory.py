"""A model several times larger than the memory there is, under a real limit that counts the page cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from memory_limit import limited
from tiny_checkpoints import tiny_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

pytestmark = pytest.mark.slow

LIMIT_BYTES = 640 << 20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of 2 GB in float32, so that it has large files and not too many weights."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=10,
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
    place = tmp_path / "large"
    model.save_pretrained(place, max_shard_size="300MB")
    tiny_tokenizer().save_pretrained(place)
    return place


def test_a_model_three_times_larger_than_the_limit(large: Path, text: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 3 * LIMIT_BYTES
    out = tmp_path / "out"
    methods = ["--prune", "reap", "--keep", "0.5", "--quantize", "gptq", "--bits", "2"]
    options = ["--text", str(text), "--tokens", "512", "--json", "--out", str(out)]
    main = [sys.executable, "-c", "from mixtura.cli import main; main()"]
    with limited(LIMIT_BYTES) as run:
        done = run([*main, "compress", str(large), *methods, *options])
        peak = run.peak_bytes()
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["bytes_after"] < told["bytes_before"] / 15
    assert told["quality"]["kl"] < 5
    assert peak <= LIMIT_BYTES
