"""Measuring what processes really take, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from mixtura.errors import SettingError, UserError
from mixtura.running.memory.accounting import account

_RUNTIME_CONTEXT = 1024
_RUNTIME_NEW_TOKENS = 8


@final
@dataclass(frozen=True, slots=True)
class MeasuredGeneration:
    """What a generating process took.

    Attributes:
        peak_bytes: the most resident memory it had, its own runtime included.
        loaded_bytes: resident memory once the model was loaded.
        tokens_per_second: decoding speed after a short prompt, by `running.generation.tokens_per_second`.
        prefill_ms: time to the first token of a full context.
    """

    peak_bytes: int
    loaded_bytes: int
    tokens_per_second: float
    prefill_ms: float


def measure_generating(model_dir: str | Path, context: int, num_new_tokens: int = 32) -> MeasuredGeneration:
    """Load a model in a fresh process, fill a context, and measure the peak of its resident memory.

    Args:
        model_dir: a checkpoint directory.
        context: tokens of prompt and answer together.
        num_new_tokens: of those, generated one by one.

    Raises:
        SettingError: the context has no room for a prompt.
        UserError: the process failed, with what it said.
    """
    if not 2 <= num_new_tokens < context:
        raise SettingError(
            f"num_new_tokens must be at least 2 and less than the context, got {num_new_tokens} of {context}"
        )
    command = [sys.executable, "-m", "mixtura.running.memory.generating"]
    command += [str(model_dir), str(context), str(num_new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["it was ended, most likely for want of memory"]
        raise UserError(f"generating from {model_dir} in a process of its own failed: {said[0]}")
    return MeasuredGeneration(**json.loads(done.stdout.strip().splitlines()[-1]))


@cache
def runtime_bytes() -> int:
    """The bare runtime of a generating process: Python, PyTorch and transformers, imported and used once.

    A process generates from a tiny model, so that everything has been imported and has run once; what
    the tiny model itself takes is subtracted. It runs twice: where libraries are not in the page cache
    yet, fewer of their pages become resident, up to 40 MiB less. Measured once per process, in about
    fifteen seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        _write_tiny_model(Path(directory))
        peaks = [measure_generating(directory, _RUNTIME_CONTEXT, _RUNTIME_NEW_TOKENS) for _ in range(2)]
        return max(p.peak_bytes for p in peaks) - account(directory, _RUNTIME_CONTEXT).total_bytes


def _write_tiny_model(directory: Path) -> None:
    """A model in float32, whose products need no compiled kernels, and a tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=_RUNTIME_CONTEXT,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config).float()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if bars:
            logging.enable_progress_bar()
