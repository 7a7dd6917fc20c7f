"""Tiny dense models on disk, with a tokenizer of single characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip


def dense_model(family: str = "llama", seed: int = 0, apart: float = 0.0, **config: Any) -> PreTrainedModel:
    """A model whose every weight, norms and biases too, is not what it begins as.

    ``apart`` moves feed-forward weights by noise of ``seed``, away from the model of seed 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if apart else seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(SIZES | config)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                centre = 1.0 if "norm" in name and family != "gemma" else 0.0
                parameter.copy_(centre + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
            torch.manual_seed(1000 + seed)
            for name, parameter in model.named_parameters():
                if apart and ".mlp." in name:
                    parameter.add_(apart * torch.randn_like(parameter))
    made: PreTrainedModel = model.eval()
    return made


def save_dense(
    path: Path,
    family: str = "llama",
    seed: int = 0,
    apart: float = 0.0,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Such a model as `save_pretrained` writes it."""
    dense_model(family, seed, apart, **config).save_pretrained(path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path


def logits_of(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """Logits of fixed tokens."""
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits
