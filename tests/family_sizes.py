"""Small sizes for the configs of every family, and for whole models of some."""

from __future__ import annotations

from typing import Any

# Values for any field of any config that has it.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "unpadded_vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "moe_hidden_size": 24,
    "moe_latent_size": 24,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "dense_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "enable_moe_block": True,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # sparse attention's indexer
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # linear attention and state spaces
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_chunk_size": 8,
    "ssm_state_size": 4,
    "n_groups": 2,
    "chunk_size": 8,
    "block_size": 8,
    # hyper-connections and others
    "hc_mult": 2,
    "gated_norm_rank": 4,
    "d_rel": 4,
    "rel_extent": 8,
    "router_hidden_size": 8,
}

_LATENT = {"num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_TINY_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "depth": 1,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "image_size": 28,
    "patch_size": 14,
}

_TINY_SAM = {
    "num_hidden_layers": 1,
    "global_attn_indexes": [0],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "output_channels": 8,
    "image_size": 64,
    "downsample_channels": [8, 16],
}

# What single families need besides; a config's parts have overrides of their own.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "bailing_hybrid": {**_LATENT, **_HYBRID},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {"sam_config": _TINY_SAM, "encoder_config": {"num_hidden_layers": 1}},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "diffusion_gemma": {
        "vision_config": {**_TINY_TOWER, "model_type": "gemma4_vision", "position_embedding_size": 16},
        "canvas_length": 16,
    },
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots3_note": {**_LATENT, "layer_types": ["indexed_attention"] * 3},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 8],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        "vision_config": _TINY_TOWER,
    },
    "glm4_moe_lite": _LATENT,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            },
        },
        "vision_config": _TINY_TOWER,
    },
    "glm5_next": {
        "text_config": {
            **_LATENT,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "qk_rope_head_dim": 0,
            "index_kpool": 2,
        },
        "vision_config": {**_TINY_TOWER, "projection_intermediate_size": 16},
    },
    "glm_moe_dsa": _LATENT,
    "granitemoehybrid": _HYBRID,
    "hy_v4_vl": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**_TINY_TOWER, "num_attention_heads": 2},
    },
    "kimi_linear": {**_LATENT, **_HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mistral4": _LATENT,
    "mistral_large4": {
        "text_config": _LATENT,
        "vision_config": {**_TINY_TOWER, "model_type": "pixtral", "num_attention_heads": 2, "head_dim": 8},
    },
    "muse_spark": {
        "out_hidden_size": 64,
        "projector_hidden_size": 16,
        "vision_config": {**_TINY_TOWER, "pos_emb_height": 4, "pos_emb_width": 4, "layer_types": None},
        "audio_config": {
            "patch_sizes": [2],
            "hidden_sizes": [16],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
        },
    },
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen3_omni_moe": {
        "vision_config": {**_TINY_TOWER, "deepstack_visual_indexes": [0]},
        "audio_config": {
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "output_dim": 32,
            "downsample_hidden_size": 8,
        },
    },
    "qwen3_vl_moe": {"vision_config": {**_TINY_TOWER, "deepstack_visual_indexes": [0]}},
    "qwen4_exp": {
        **_HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "unlimited_ocr": {
        "text_config": {"topk_method": "group_limited_greedy"},
        "vision_config": {
            "sam_config": {**_TINY_SAM, "mlp_dim": 16},
            "encoder_config": {**_TINY_TOWER, "num_attention_heads": 2},
        },
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Whole models of families whose experts are in more than the language model.
VARIANT_SIZES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_omni_moe_whole": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        {
            "thinker_config": OVERRIDES["qwen3_omni_moe"],
            "talker_config": {
                "text_config": {"num_local_experts": 4, "shared_expert_intermediate_size": 16},
                "spatial_merge_size": 2,
                "num_code_groups": 4,
                "thinker_hidden_size": 32,
                "accept_hidden_layer": 1,
            },
            "code2wav_config": {
                "codebook_size": 16,
                "upsample_rates": [2, 2],
                "upsampling_ratios": [2],
                "decoder_dim": 16,
                "num_quantizers": 4,
            },
        },
    ),
    "dots3_note_whole": (
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        {
            "text_config": OVERRIDES["dots3_note"],
            "vision_config": {
                **_TINY_TOWER,
                "num_attention_heads": 2,
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
                "mlp_layer_types": ["sparse"],
            },
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": 32,
                "conv_output_size": 16,
            },
        },
    ),
    "gemma4_whole": (
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "vision_config": {**_TINY_TOWER, "num_attention_heads": 2, "position_embedding_size": 16},
            "audio_config": None,
        },
    ),
    "qwen3_5_moe_whole": (
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": _HYBRID, "vision_config": _TINY_TOWER},
    ),
    "minimax_m3_vl_whole": (
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "vision_config": {**_TINY_TOWER, "num_attention_heads": 2},
            "projector_hidden_size": 16,
            "merged_hidden_size": 16,
        },
    ),
    # Gate and up alternate on disk.
    "inkling2_whole": (
        "inkling2",
        "Inkling2ForConditionalGeneration",
        {
            "vision_config": {
                **_TINY_TOWER,
                "num_attention_heads": 2,
                "projection_hidden_dim": 16,
                "text_hidden_size": 32,
                "posemb_grid_size": 4,
            },
        },
    ),
    "aria_whole": (
        "aria",
        "AriaForConditionalGeneration",
        {
            "vision_config": {**_TINY_TOWER, "num_attention_heads": 2, "model_type": "idefics3_vision"},
            "projector_patch_to_query_dict": {4: 2},
        },
    ),
    # A text model of one family inside a model of another.
    "mistral3_mistral4": (
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**SIZES, **_LATENT, "model_type": "mistral4"},
            "vision_config": {
                **_TINY_TOWER,
                "model_type": "pixtral",
                "num_attention_heads": 2,
                "head_dim": 8,
            },
        },
    ),
}
