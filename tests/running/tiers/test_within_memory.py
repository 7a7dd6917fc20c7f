"""A model larger than what its process may take runs within that, and says the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_limit import limited
from tiny_checkpoints import run_fresh, tiny_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixtura.report.units import parse_bytes

BUDGET = "640MiB"
NUM_TOKENS = "12"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 400 MiB of experts, in the width of real ones."""
    path = tmp_path_factory.mktemp("wide")
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=4,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            Qwen3MoeForCausalLM(config).save_pretrained(path)
        finally:
            torch.set_default_dtype(torch.float32)
    tiny_tokenizer().save_pretrained(path)
    return path


def generate(model: Path, *more: str) -> list[str]:
    return [
        "generate",
        str(model),
        "the quick brown fox jumps over it",
        "--max-new-tokens",
        NUM_TOKENS,
        "--json",
        *more,
    ]


def result(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-2000:]
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.mark.slow
def test_the_limit_holds(model: Path) -> None:
    resident = result(run_fresh(*generate(model)))
    # The first run measures what Python takes, which has no place in a group with this limit.
    little = result(run_fresh(*generate(model, "--memory", BUDGET, "--prefetch", "next_gate")))
    assert resident["text"] == little["text"]
    assert little["memory"]["pool_bytes"] < little["memory"]["expert_bytes"] / 2
    assert little["experts"]["demanded_bytes"] > 0
    assert little["peak_bytes"] <= parse_bytes(BUDGET) < resident["peak_bytes"]


@pytest.mark.slow
def test_a_control_group_of_the_budget_is_enough(model: Path) -> None:
    free = result(run_fresh(*generate(model, "--memory", BUDGET)))
    code = "from mixtura.cli import main; main()"
    with limited(parse_bytes(BUDGET)) as run:
        held = result(run([sys.executable, "-c", code, *generate(model, "--memory", BUDGET)]))
    assert held["text"] == free["text"]


@pytest.mark.slow
def test_the_smallest_memory_that_is_named_is_enough(model: Path) -> None:
    refused = run_fresh(*generate(model, "--memory", "100MiB"))
    assert refused.returncode == 3
    assert "Traceback" not in refused.stderr
    smallest = refused.stderr.strip().rpartition("the smallest memory is ")[2]
    made = result(run_fresh(*generate(model, "--memory", smallest)))
    assert made["peak_bytes"] <= parse_bytes(smallest)
