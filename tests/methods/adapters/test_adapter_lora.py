"""What the adapter lora promises beyond its kind's contract: it is PEFT's LoRA."""

from __future__ import annotations

import pytest
import torch
from adapting.adapted_models import logits, plain
from methods.adapters.adapter_sites import linear_site
from peft import LoraConfig, get_peft_model

import mixtura
from mixtura.errors import SettingError
from mixtura.methods.adapters.lora import Lora


def test_it_is_pefts_lora() -> None:
    """The same factors at the same layers give the same predictions."""
    theirs = get_peft_model(
        plain("qwen3_moe"), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    )
    config = mixtura.AdapterConfig(
        method="lora", settings={"rank": 3, "alpha": 6.0}, target_modules=["q_proj", "v_proj"]
    )
    ours = get_peft_model(plain("qwen3_moe"), config)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in theirs.named_parameters():
            for key in ("a", "b"):
                if f"lora_{key.upper()}" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                    place = name.partition(".lora_")[0]
                    own[f"{place}.mixtura_adapter.default.{key}"].copy_(parameter[None])
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=1e-5, atol=1e-5)


def test_rank_is_at_most_the_smaller_side() -> None:
    with pytest.raises(SettingError, match=r"rank of Lora must be in \[1, 16\], got 17"):
        Lora(linear_site(), rank=17)
