"""Models of our own that were saved when experts were parameters of their layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtura.errors import CheckpointError
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.family import MixturaForCausalLM

IDS = torch.arange(3, 15)[None]
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def saved_with_earlier_names(path: Path, **settings: Any) -> MixturaForCausalLM:
    """A model with weights that no seed would draw, and its checkpoint as it was written before."""
    model = MixturaForCausalLM(MixturaConfig(**SIZES, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(path)
    file = path / "model.safetensors"
    weights = {name.replace(".bank.", "."): values for name, values in load_file(file).items()}
    assert any(name.endswith("gate_up_proj") for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    return model


def assert_the_same(one: MixturaForCausalLM, other: MixturaForCausalLM) -> None:
    """Weights to the bit; where they lie in memory can change the last bit of a product."""
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=1e-6, atol=1e-6)


def test_they_load_and_can_be_saved_again(tmp_path: Path) -> None:
    model = saved_with_earlier_names(tmp_path / "old")
    loaded = MixturaForCausalLM.from_pretrained(tmp_path / "old").eval()
    assert_the_same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    again = MixturaForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert_the_same(again, model)


def test_pools_of_experts_are_refused_and_not_drawn_anew(tmp_path: Path) -> None:
    saved_with_earlier_names(tmp_path / "old", moe={"pool": 2})
    with pytest.raises(CheckpointError, match="named as an earlier mixtura named experts of a pool"):
        MixturaForCausalLM.from_pretrained(tmp_path / "old")
