"""Make a checkpoint of a well-known model's shape at full width, with fewer layers and random weights.

    python benchmarks/made.py DIRECTORY --layers 4      # Qwen3-30B-A3B, 5.9 GB, about a minute

Random weights have nothing of what training gives, but for what is put in here: routers that prefer some
experts, experts that put out more than others, and inputs of which some matter more. What such a model
loses says little of trained ones; how long work on it takes, and in how much memory, says much.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3MoeConfig

from mixtura.data import specimen

LAYERS = 4
VOCABULARY = 151936
_DTYPE = torch.bfloat16
# Standard deviations: of the logarithm of experts' outputs and of channels' sizes, of routers' preferences.
_EXPERTS, _CHANNELS, _PREFERENCE = 0.3, 0.5, 1.0
# Of each channel, what all tokens have in common.
_COMMON = 0.5


def qwen3_30b_a3b(num_layers: int, vocabulary: int = VOCABULARY) -> Qwen3MoeConfig:
    """The configuration of Qwen3-30B-A3B, whose 48 layers are alike."""
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
        eos_token_id=0,
        pad_token_id=0,
    )


def make(directory: Path, num_layers: int = LAYERS, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """Write the checkpoint, a file a layer, with the specimen's tokenizer, unless it is there."""
    if (directory / "model.safetensors.index.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = qwen3_30b_a3b(num_layers, vocabulary)
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(specimen.path() / name, directory / name)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    for layer in range(-1, num_layers):
        tensors = _outside(config, generator) if layer < 0 else _layer(config, layer, generator)
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def _normal(generator: torch.Generator, *shape: int, size: float) -> Tensor:
    return torch.randn(shape, generator=generator) * size


def _outside(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Embeddings, the head and the last norm."""
    wide, vocabulary = config.hidden_size, config.vocab_size
    return {
        "model.embed_tokens.weight": (_normal(generator, vocabulary, wide, size=1.0) + _COMMON).to(_DTYPE),
        "lm_head.weight": _normal(generator, vocabulary, wide, size=3 * wide**-0.5).to(_DTYPE),
        "model.norm.weight": torch.ones(wide, dtype=_DTYPE),
    }


def _layer(config: PreTrainedConfig, layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    wide, expert, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    prefix = f"model.layers.{layer}."
    router = _normal(generator, config.num_experts, wide, size=wide**-0.5)
    # Rows of some experts lean towards what all tokens have in common.
    preference = _normal(generator, config.num_experts, 1, size=_PREFERENCE / wide)
    channels = torch.exp(_normal(generator, wide, size=_CHANNELS))
    made = {
        "self_attn.q_proj.weight": _normal(generator, queries, wide, size=wide**-0.5),
        "self_attn.k_proj.weight": _normal(generator, keys, wide, size=wide**-0.5),
        "self_attn.v_proj.weight": _normal(generator, keys, wide, size=wide**-0.5),
        "self_attn.o_proj.weight": _normal(generator, wide, queries, size=queries**-0.5),
        "self_attn.q_norm.weight": torch.ones(head),
        "self_attn.k_norm.weight": torch.ones(head),
        "input_layernorm.weight": torch.ones(wide),
        "post_attention_layernorm.weight": channels,
        "mlp.gate.weight": router + preference,
    }
    for number in range(config.num_experts):
        size = float(torch.exp(_normal(generator, 1, size=_EXPERTS)))
        part = f"mlp.experts.{number}."
        made[part + "gate_proj.weight"] = _normal(generator, expert, wide, size=wide**-0.5)
        made[part + "up_proj.weight"] = _normal(generator, expert, wide, size=wide**-0.5)
        made[part + "down_proj.weight"] = _normal(generator, wide, expert, size=size * expert**-0.5)
    return {prefix + name: tensor.to(_DTYPE) for name, tensor in made.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    print(make(arguments.directory, arguments.layers))
