"""Tiny models of our own, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM


def tiny_config(moe: dict[str, Any] | None = None, **fields: Any) -> MixturaConfig:
    """Two layers of four experts, a top-2 router and a balancing loss, unless said otherwise."""
    described = {"router": {"name": "top_k", "top_k": 2}, "num_experts": 4, "d_expert": 16} | (moe or {})
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2, "moe": described,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return MixturaConfig(**(values | fields))


def tiny_model(moe: dict[str, Any] | None = None, **fields: Any) -> MixturaForCausalLM:
    """The model of `tiny_config`, ready to evaluate."""
    return MixturaForCausalLM(tiny_config(moe, **fields)).eval()


def some_ids(rows: int = 2, places: int = 10, seed: int = 0) -> Tensor:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, places), generator=generator)
