"""The families of transformers that llama.cpp computes in the same way, and what it has to be told of each.

A family's entry says how llama.cpp calls it, which of its settings go into the file, and which settings
llama.cpp computes otherwise: a model with one of those is refused, because its file would run and be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from mixtura.checkpoints.gguf.rotary import rotary_fields, rotary_objections
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.errors import UnsupportedModelError

Fields = dict[str, Any]
_SOFTMAX, _SIGMOID = 1, 2


@final
@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp has to be told of a family.

    Attributes:
        arch: llama.cpp's name.
        fields: settings of the config under llama.cpp's names, beside those that all families have.
        objections: what in a config llama.cpp computes otherwise, in words.
        pairs: query and key rows of a head are in pairs there, where transformers has halves.
        latent: attention of a latent that keys and values are made of (DeepSeek).
        needs_head: the head is stored even where it is the embedding.
    """

    arch: str
    fields: Callable[[Any], Fields]
    objections: Callable[[Any], list[str]]
    pairs: bool = False
    latent: bool = False
    needs_head: bool = False


def family_of(view: CheckpointView) -> Family:
    """The entry of a model's family.

    Raises:
        UnsupportedModelError: the family, or something of this model, is not known to be the same there.
    """
    family = FAMILIES.get(view.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"the family {view.model_type} cannot be written as GGUF; these can: {', '.join(FAMILIES)}"
        )
    found = family.objections(view.config) + rotary_objections(view.config, latent=family.latent)
    if view.config.hidden_act != "silu":
        found.append(f"the activation silu, not {view.config.hidden_act}")
    if len({layer.num_experts for layer in view.layers}) > 1:
        found.append("as many experts in every layer; this model has different numbers of them")
    if found:
        raise UnsupportedModelError(
            f"llama.cpp would compute this {view.model_type} model otherwise: there it has "
            f"{' and '.join(found)}"
        )
    return family


def fields_of(view: CheckpointView, family: Family) -> Fields:
    """All settings of a model under llama.cpp's names, without the architecture before them."""
    config = view.config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    common: Fields = {
        "block_count": int(config.num_hidden_layers),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.num_key_value_heads or heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "expert_count": view.layers[0].num_experts,
        "expert_used_count": view.layers[0].top_k,
        "vocab_size": int(config.vocab_size),
    }
    return common | rotary_fields(config, latent=family.latent) | family.fields(config)


def _mixtral(config: Any) -> Fields:
    del config
    return {}


def _against_mixtral(config: Any) -> list[str]:
    return _no_window(config)


def _qwen3_moe(config: Any) -> Fields:
    return {"expert_feed_forward_length": int(config.moe_intermediate_size)}


def _against_qwen3_moe(config: Any) -> list[str]:
    return (
        _no_dense(config)
        + _no_window(config)
        + _told(config.norm_topk_prob, "routing weights that sum to one (norm_topk_prob)")
        + _told(not config.attention_bias, "no biases in attention (attention_bias)")
    )


def _qwen2_moe(config: Any) -> Fields:
    return {
        "expert_feed_forward_length": int(config.moe_intermediate_size),
        "expert_shared_feed_forward_length": int(config.shared_expert_intermediate_size),
    }


def _against_qwen2_moe(config: Any) -> list[str]:
    return (
        _no_dense(config)
        + _no_window(config)
        + _told(not config.norm_topk_prob, "routing weights as they are (no norm_topk_prob)")
    )


def _olmoe(config: Any) -> Fields:
    del config
    return {}


def _against_olmoe(config: Any) -> list[str]:
    return (
        _told(not config.norm_topk_prob, "routing weights as they are (no norm_topk_prob)")
        + _told(not config.attention_bias, "no biases in attention (attention_bias)")
        + _told(config.clip_qkv is None, "no limit of queries, keys and values (clip_qkv)")
        + _told(config.num_key_value_heads == config.num_attention_heads, "as many key heads as query heads")
    )


def _latent(config: Any, gating: int, *, normed: bool) -> Fields:
    """DeepSeek's settings: keys and values are one latent head, which every head expands."""
    rank, rotary = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    return {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotary,
        "attention.value_length": rank,
        "attention.key_length_mla": int(config.qk_nope_head_dim) + rotary,
        "attention.value_length_mla": int(config.v_head_dim),
        "rope.dimension_count": rotary,
        "leading_dense_block_count": int(config.first_k_dense_replace),
        "expert_feed_forward_length": int(config.moe_intermediate_size),
        "expert_shared_count": int(config.n_shared_experts),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": normed,
        "expert_gating_func": gating,
        # 0 for queries that are made at once; llama.cpp asks for it where a model has not 26 or 27 layers.
        "attention.q_lora_rank": int(config.q_lora_rank or 0),
    }


def _deepseek_v2(config: Any) -> Fields:
    return _latent(config, _SOFTMAX, normed=False)


def _against_deepseek_v2(config: Any) -> list[str]:
    grouped = config.topk_method != "greedy" and config.topk_group != config.n_group
    return (
        _told(not grouped, "no groups of experts that are chosen by their best (group_limited_greedy)")
        + _told(not config.attention_bias, "no biases in attention (attention_bias)")
        + _told(not config.mlp_bias, "no biases in dense layers (mlp_bias)")
    )


def _deepseek_v3(config: Any) -> Fields:
    groups = {"expert_group_count": int(config.n_group), "expert_group_used_count": int(config.topk_group)}
    return _latent(config, _SIGMOID, normed=bool(config.norm_topk_prob)) | groups


def _against_deepseek_v3(config: Any) -> list[str]:
    return _told(config.rope_interleave, "rotary positions in pairs (rope_interleave)") + _told(
        not config.attention_bias, "no biases in attention (attention_bias)"
    )


def _told(is_so: Any, what: str) -> list[str]:
    return [] if is_so else [what]


def _no_window(config: Any) -> list[str]:
    used = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return _told(not used, "attention to all earlier tokens, no sliding_window")


def _no_dense(config: Any) -> list[str]:
    return _told(
        config.decoder_sparse_step == 1 and not config.mlp_only_layers,
        "experts in every layer (no mlp_only_layers, decoder_sparse_step 1)",
    )


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family("qwen3moe", _qwen3_moe, _against_qwen3_moe),
    "qwen2_moe": Family("qwen2moe", _qwen2_moe, _against_qwen2_moe),
    "olmoe": Family("olmoe", _olmoe, _against_olmoe, needs_head=True),
    "mixtral": Family("llama", _mixtral, _against_mixtral, pairs=True),
    "deepseek_v2": Family("deepseek2", _deepseek_v2, _against_deepseek_v2, latent=True),
    "deepseek_v3": Family("deepseek2", _deepseek_v3, _against_deepseek_v3, latent=True),
}
