"""Accounts: exact where arithmetic can say it, and there for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_config, tiny_model
from tiny_checkpoints import save_tiny
from tiny_plans import save_packed, save_source, save_uneven
from tiny_scaled import save_fp8, save_mxfp4
from transformers import PreTrainedModel

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import SettingError
from mixtura.running.loading import load
from mixtura.running.memory import account, tokenizer_bytes

# One family for every kind of cache and attention that transformers has.
KINDS_OF_CACHE = (
    "afmoe",
    "bailing_hybrid",
    "deepseek_v32",
    "deepseek_v4",
    "gemma4",
    "glm5_next",
    "gpt_oss",
    "granitemoehybrid",
    "inkling",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "qwen4_exp",
    "unlimited_ocr",
    "zaya",
)


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of everything a model keeps: parameters, stored buffers, packed experts."""
    stored = model.state_dict()
    buffers = [buffer for name, buffer in model.named_buffers() if name in stored]
    stores = [module.mixtura_store for module in model.modules() if hasattr(module, "mixtura_store")]
    return sum(t.nbytes for t in (*model.parameters(), *buffers)) + sum(store.num_bytes for store in stores)


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_weights_are_what_loading_keeps(family: str, tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, family)
    for path in (source, packed):
        assert account(path, 32).weights_bytes == held_bytes(load(path))
    assert account(packed, 32).expert_bytes < account(source, 32).expert_bytes / 2


@pytest.mark.slow
def test_weights_of_other_formats_are_what_loading_keeps(tmp_path: Path) -> None:
    for path in (save_fp8(tmp_path / "fp8"), save_mxfp4(tmp_path / "mxfp4")):
        assert account(path, 32).weights_bytes == pytest.approx(held_bytes(load(path)), abs=64 * 1024)
    _, uneven = save_uneven(tmp_path, "qwen3_moe")
    assert account(uneven, 32).weights_bytes == held_bytes(load(uneven))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_the_cache_of_plain_attention_is_two_vectors_a_token(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    for context in (2, 33, 700):
        assert account(tmp_path / "model", context).kv_cache_bytes == context * per_token
    assert account(tmp_path / "model", 33, batch=3).kv_cache_bytes == 3 * 33 * per_token


@pytest.mark.slow
def test_a_sliding_window_bounds_the_cache(tmp_path: Path) -> None:
    path = save_source(tmp_path / "source", "mixtral")
    assert tiny_config("mixtral").sliding_window == 8
    assert account(path, 400).kv_cache_bytes < account(path, 4000).kv_cache_bytes * 2
    assert account(path, 4000).kv_cache_bytes == account(path, 8000).kv_cache_bytes


@pytest.mark.slow
def test_the_cache_of_latent_attention_is_what_the_family_keeps(tmp_path: Path) -> None:
    path = save_source(tmp_path / "source", "deepseek_v3")
    config = tiny_config("deepseek_v3")
    per_token = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    assert account(path, 100).kv_cache_bytes % per_token == 0


@pytest.mark.slow
def test_more_context_takes_more_and_a_prompt_is_read_in_chunks(tmp_path: Path) -> None:
    path = save_source(tmp_path / "source", "qwen3_moe")
    accounts = [account(path, context) for context in (16, 256, 4096)]
    totals = [found.total_bytes for found in accounts]
    assert totals == sorted(totals)
    # Activations of a chunk do not grow with the context; its mask and keys do, by little.
    assert accounts[2].working_bytes - accounts[1].working_bytes < 16 * accounts[2].kv_cache_bytes


@pytest.mark.slow
def test_decoding_experts_takes_room(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "qwen3_moe")
    assert account(packed, 2).working_bytes > account(source, 2).working_bytes


def test_the_tokenizer_is_accounted_for(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    assert account(path, 16).tokenizer_bytes == tokenizer_bytes(path) > 0
    assert account(save_source(tmp_path / "bare", "qwen3_moe"), 16).tokenizer_bytes == 0


def test_a_view_does_as_well_as_a_path(tmp_path: Path) -> None:
    path = save_source(tmp_path / "source", "qwen3_moe")
    view = open_checkpoint(path)
    assert account(view, 64) == account(path, 64) == account(view, 64)
    with pytest.raises(SettingError, match="at least 1"):
        account(view, 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS_OF_CACHE)
def test_every_kind_of_cache_has_an_account(family: str, tmp_path: Path) -> None:
    path = save_source(tmp_path / "source", family)
    found = account(path, 48)
    assert found.weights_bytes == held_bytes(load(path))
    assert 0 < found.kv_cache_bytes < 1 << 20
    assert found.working_bytes > 6 << 20
