"""Tiny checkpoints on disk with a tokenizer of single characters."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path

from command_server import ENVIRONMENT, run_forked
from families import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<pad>", "<unk>", "<s>")
_CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:;()=+-*/_<>'\"[]?"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every character a token; 61 of them at most, for vocabularies of 64."""
    vocab = {token: number for number, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    assert len(vocab) <= 64
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def save_tiny(path: Path, family: str = "qwen3_moe", seed: int = 0) -> Path:
    """A tiny model of a family and its tokenizer, as `save_pretrained` writes them."""
    tiny_model(family, seed=seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run_mixtura(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: forked, or fresh where its environment is another one."""
    return run_forked(arguments) if env is None else run_fresh(*arguments, env=env)


def run_fresh(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command line as a shell starts it: for what imports, or the size of the process, decide."""
    return subprocess.run(
        [sys.executable, "-c", "from mixtura.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        stdin=subprocess.DEVNULL,
        check=False,
    )
