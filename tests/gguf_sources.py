"""Tiny checkpoints of the families that can be written as GGUF, with tokenizers of bytes and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

TEXT = (
    "The quick brown fox jumps over the lazy dog, and 12 quicker foxes jump over 345 lazier dogs. "
    "Der schnelle Fuchs springt über den Hund; the dog doesn't mind.\n\tdef fox(dog):\n\t    return dog + 1\n"
)
VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, head_dim=32, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, mlp_only_layers=[],
    ),
    "qwen3_moe tied": lambda: Qwen3MoeConfig(
        **_COMMON, head_dim=16, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=True, rope_parameters=_YARN,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, moe_intermediate_size=32, shared_expert_intermediate_size=96, num_experts=8,
        num_experts_per_tok=2,
    ),
    "olmoe": lambda: OlmoeConfig(
        **{**_COMMON, "num_key_value_heads": 4}, num_experts=8, num_experts_per_tok=2
    ),
    "olmoe tied": lambda: OlmoeConfig(
        **{**_COMMON, "num_key_value_heads": 4}, num_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=True,
    ),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "deepseek_v2": lambda: DeepseekV2Config(**_LATENT, routed_scaling_factor=1.5),
    "deepseek_v2 lite": lambda: DeepseekV2Config(
        **{**_LATENT, "q_lora_rank": None},
        rope_parameters={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": lambda: DeepseekV3Config(**_LATENT, n_group=4, topk_group=2),
}  # fmt: skip


def save_source(path: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model of a family, every tensor with values of its own, and its tokenizer."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.data.normal_(0.0, 0.2)
                if "norm" in name:
                    tensor.data.add_(1.0)
    model.to(dtype).save_pretrained(path)
    (spaced_tokenizer() if family == "mixtral" else byte_tokenizer("smollm")).save_pretrained(path)
    return path


def byte_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """Bytes and merges, with text split into words in one of the ways that llama.cpp knows."""
    backend = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ways = {"gpt-2": [letters], "smollm": [pre_tokenizers.Digits(individual_digits=True), letters]}
    backend.pre_tokenizer = pre_tokenizers.Sequence(ways[split])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken("<fox>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Merges of characters with spaces marked, and bytes for what is in no token, as Mixtral has it."""
    letters = sorted(set(TEXT.replace(" ", "▁").replace("\n", "").replace("\t", "")))
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3 - 256, initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator([TEXT], trainer)
    import json

    stated = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: number for number, token in enumerate(first)}
    for token in sorted(stated["vocab"], key=stated["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in stated["merges"]]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in first[:3]])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
