"""Adapters written as plain LoRA: what PEFT itself makes of them, and expert by expert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapting.adapted_models import adapted, error, logits, plain
from peft import PeftModel
from safetensors.torch import load_file

from mixtura.adapting.exporting import export_lora
from mixtura.errors import OutputError, UnsupportedModelError, UserError


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "aria"])
def test_peft_reads_what_was_learned_on_experts(family: str, tmp_path: Path) -> None:
    """With ranks by expert, some experts unchanged, and PEFT's own LoRA on stacked parameters."""
    settings = {"rank": 2, "ranks": {"1": 4}, "experts": [0, 1, 5]}
    model = adapted(family, "expert_lora", settings=settings)
    export_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = PeftModel.from_pretrained(plain(family, "eager"), tmp_path / "lora").eval()
    assert error(logits(theirs), logits(model)) < 2e-5
    assert error(logits(theirs), logits(plain(family))) > 1e-3


def test_peft_reads_what_was_learned_on_linear_layers(tmp_path: Path) -> None:
    model = adapted("qwen3_moe", "lora")
    export_lora(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(plain("qwen3_moe"), tmp_path / "lora").eval()
    assert error(logits(theirs), logits(model)) < 2e-5


def test_expert_by_expert_gate_and_up_are_the_halves(tmp_path: Path) -> None:
    model = adapted("qwen3_moe", "expert_lora")
    export_lora(model, tmp_path / "lora", layout="per_expert")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    before = dict(plain("qwen3_moe").named_parameters())
    after = dict(model.merge_and_unload().named_parameters())
    name = "model.layers.0.mlp.experts"
    for expert in range(8):
        delta = {}
        for projection in ("gate_proj", "up_proj", "down_proj"):
            owner = f"base_model.model.{name}.{expert}.{projection}"
            delta[projection] = tensors[f"{owner}.lora_B.weight"] @ tensors[f"{owner}.lora_A.weight"]
        up = after[f"{name}.gate_up_proj"][expert] - before[f"{name}.gate_up_proj"][expert]
        down = after[f"{name}.down_proj"][expert] - before[f"{name}.down_proj"][expert]
        both = torch.cat([delta["gate_proj"], delta["up_proj"]])
        torch.testing.assert_close(both, up, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(delta["down_proj"], down, rtol=1e-4, atol=1e-5)


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plain LoRA"):
        export_lora(adapted("qwen3_moe", "esft"), tmp_path / "lora")
    with pytest.raises(UnsupportedModelError, match="not called gate_proj"):
        export_lora(adapted("gpt_oss", "expert_lora"), tmp_path / "lora", layout="per_expert")
    with pytest.raises(OutputError, match="is there already"):
        export_lora(adapted("qwen3_moe", "lora"), tmp_path)
    assert not list(tmp_path.iterdir())
