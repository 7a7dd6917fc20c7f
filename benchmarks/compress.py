"""Measure what calibration costs: time and peak memory per billion parameters, streamed and in memory.

A made checkpoint of random weights is observed on random tokens for the pruner REAP, each way in a process of
its own: by `mixtura compress`'s streamed pass (``streamed``), with the model loaded (``whole``), and by
llm-compressor's REAP where it is installed (``llmcompressor``). ``rounded`` is the streamed pass that rounds
every expert by GPTQ to 4 bits. Peak memory is that of the process, files that the system caches aside.

    python benchmarks/compress.py                     # 0.55 billion parameters, a few minutes
    python benchmarks/compress.py --layers 12 --rows streamed whole

llm-compressor comes with ``pip install llmcompressor``; its row is left out where it is not installed. Rows
measured anew take the place of those kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from layer import machine
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import mixtura
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.data.tokens import TokenBatch
from mixtura.fitting.compressing.passing import observed, rounded
from mixtura.fitting.compressing.rounding import Shrunk
from mixtura.fitting.journal import open_journal
from mixtura.running.memory.process import peak_resident_bytes, settle
from mixtura.running.observing.passing import Wanted, observe_model
from mixtura.types import Plan

RESULTS = Path(__file__).parent / "results" / "compress.json"
STATISTIC, LENGTH = "weighted_output_norm", 512


def make(folder: Path, layers: int, experts: int, width: int) -> int:
    """A checkpoint of Qwen3-MoE's shape with random weights in bfloat16; its number of parameters."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=width,
        moe_intermediate_size=width * 3 // 8,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    return int(model.num_parameters())


def text(num_tokens: int) -> TokenBatch:
    """Random tokens."""
    rows = max(1, num_tokens // LENGTH)
    ids = torch.randint(0, 4096, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return TokenBatch(ids, torch.ones_like(ids), torch.zeros(rows, dtype=torch.int64), ("text",))


def streamed(folder: Path, tokens: TokenBatch, work: Path) -> None:
    """The pass of `mixtura compress --prune reap`."""
    with open_journal(work, {}) as journal:
        observed(open_checkpoint(folder), tokens, Wanted((STATISTIC,)), journal, print)


def rounding(folder: Path, tokens: TokenBatch, work: Path) -> None:
    """The pass of `mixtura compress --quantize gptq --bits 4`."""
    shrunk = Shrunk(Plan("made"), "gptq", {"bits": 4})
    with open_journal(work, {}) as journal:
        rounded(open_checkpoint(folder), shrunk, tokens, journal, print)


def whole(folder: Path, tokens: TokenBatch, work: Path) -> None:
    """The same statistic with the whole model in memory."""
    del work
    observe_model(mixtura.load(folder), tokens, statistics=(STATISTIC,), progress=False)


def llmcompressor(folder: Path, tokens: TokenBatch, work: Path) -> None:
    """llm-compressor's REAP on the same tokens, its pruning included, nothing written."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.pruning.reap.base import (  # type: ignore[import-not-found]
        REAPPruningModifier,
    )

    del work
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = {"input_ids": tokens.input_ids.tolist(), "attention_mask": tokens.attention_mask.tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=REAPPruningModifier(sparsity=0.5),
        num_calibration_samples=tokens.num_sequences,
        max_seq_length=LENGTH,
    )


WAYS: dict[str, Callable[[Path, TokenBatch, Path], None]] = {
    "streamed": streamed,
    "rounded": rounding,
    "whole": whole,
    "llmcompressor": llmcompressor,
}


def run_here(row: str, folder: Path, num_tokens: int) -> None:
    """One way, in this process; prints what it took as the last line."""
    # As the command does.
    settle(16 << 20)
    tokens = text(num_tokens)
    before = peak_resident_bytes()
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        started = time.perf_counter()
        WAYS[row](folder, tokens, Path(work) / "work")
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident_bytes(), "start_bytes": before}))


def measured(row: str, folder: Path, num_tokens: int, parameters: int) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--here", row, "--model", str(folder), "--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"row": row, "error": (done.stderr.strip().splitlines() or ["it failed"])[-1][:300]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    billions = parameters / 1e9
    return {
        "row": row,
        **found,
        "seconds_per_billion": found["seconds"] / billions,
        # Python, PyTorch and transformers aside.
        "added_bytes_per_parameter": (found["peak_bytes"] - found["start_bytes"]) / parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        run_here(given.here, given.model, given.tokens)
        return
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        parameters = make(source, given.layers, given.experts, given.width)
        shape = {"parameters": parameters, "tokens": given.tokens, "layers": given.layers}
        for row in given.rows:
            if row == "llmcompressor" and importlib.util.find_spec("llmcompressor") is None:
                print("llmcompressor is not installed")
                continue
            found = measured(row, source, given.tokens, parameters) | shape | machine()
            found["date"] = datetime.now(UTC).date().isoformat()
            print(json.dumps(found))
            if "error" not in found:
                kept = [one for one in kept if one["row"] != row] + [found]
    RESULTS.write_text(json.dumps({"rows": kept}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
