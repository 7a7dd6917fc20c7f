"""A tiny model with the specimen's tokenizer, and records to learn from."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from mixtura.data import specimen

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "kappa", "sigma", "theta"]


def write_model(folder: Path, *, tied: bool = True, **sizes: Any) -> Path:
    """A Qwen3-MoE model of two layers, or a dense Qwen3 where it has no experts."""
    shared = {
        "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": tied, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if sizes.pop("dense", False):
            model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared))
        else:
            moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shared | moe | sizes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(specimen.path()).save_pretrained(folder)
    return folder


def write_records(file: Path, count: int = 60, shape: str = "messages", seed: int = 0) -> Path:
    """Records of one shape that ask for words in the other order."""
    rng = Random(seed)
    lines = []
    for _ in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 9))]
        asked, answer = f"reverse {' '.join(words)}", " ".join(reversed(words))
        lines.append(json.dumps(worded(shape, asked, answer)))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def worded(shape: str, asked: str, answer: str) -> dict[str, Any]:
    """One record."""
    if shape == "messages":
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {"messages": turns}
    if shape == "prompt":
        return {"prompt": f"Question: {asked}\n", "completion": answer}
    return {"text": f"{asked} {answer}"}
