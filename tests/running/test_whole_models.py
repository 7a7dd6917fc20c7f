"""Whole models by transformers: every weight from the files, or one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mixtura.errors import CheckpointError, UnsupportedModelError, UserError
from mixtura.running.whole import load_whole
from mixtura.train.tuning.models import load_base

WEIGHTS = "model.safetensors"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def configured(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(path: Path, name: str) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors[name]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def cut(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def test_every_weight_is_from_the_files(dense: Path) -> None:
    stored, model = load_file(dense / WEIGHTS), load_whole(dense)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter), name


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: configured(path, model_type="lama"), UnsupportedModelError, "did you mean 'llama'"),
        (lambda path: configured(path, hidden_size=24), CheckpointError, "transformers cannot load"),
        (lambda path: configured(path, num_hidden_layers=3), CheckpointError, "lack 9 of the weights"),
        (lambda path: without(path, "model.norm.weight"), CheckpointError, "the first model.norm.weight"),
        (cut, CheckpointError, "is damaged"),
        (lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"), UserError, "safetensors"),
        (lambda path: (path / "config.json").unlink(), CheckpointError, "no config.json"),
    ],
)
def test_what_is_not_whole_is_said(
    dense: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(dense)
    with pytest.raises(error, match=message):
        load_whole(dense)


def test_a_model_to_tune_of_an_unknown_type_is_said(dense: Path) -> None:
    configured(dense, model_type="lama")
    with pytest.raises(UnsupportedModelError, match="no model type 'lama'; did you mean 'llama'"):
        load_base(dense)
