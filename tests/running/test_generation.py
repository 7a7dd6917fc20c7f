"""Generating: chunks and reserved caches change nothing, and random numbers stay where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_checkpoints import tiny_tokenizer
from transformers import DynamicCache, PreTrainedModel

from mixtura.errors import SettingError, UserError
from mixtura.running import generation
from mixtura.running.generation import (
    ReservedLayer,
    encode_prompt,
    generate,
    new_tokens,
    prefills_in_chunks,
    reserved_cache,
    spread_ids,
    tokens_per_second,
)

FAMILIES = (
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "jamba",
    "minimax",
    "deepseek_v32",
)


def model_of(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_reserved_caches_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    monkeypatch.setattr(generation, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(generation, "CHUNK_TOKENS_EAGER", 7)
    prompt = spread_ids(model, 40) % 60
    ours = new_tokens(model, prompt, max_new_tokens=8, min_new_tokens=8)
    theirs: Any = model.generate(
        input_ids=prompt[None],
        attention_mask=torch.ones(1, 40, dtype=torch.int64),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(ours, theirs[0, 40:])


def test_caches_are_reserved_where_they_would_grow() -> None:
    cache = reserved_cache(model_of("qwen3_moe"), 48)
    assert cache is not None
    assert all(isinstance(layer, ReservedLayer) for layer in cache.layers)
    assert prefills_in_chunks(cache)
    assert reserved_cache(model_of("minimax"), 48) is None
    sparse = reserved_cache(model_of("deepseek_v32"), 48)
    assert sparse is not None
    assert not prefills_in_chunks(sparse)


def test_a_reserved_layer_holds_what_a_growing_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    reserved, growing = ReservedLayer(6), DynamicCache().layer_class_to_replicate()
    for length in (3, 1, 2, 4):
        # The last ones are more than was reserved.
        states = [torch.randn(2, 3, length, 5, generator=generator) for _ in range(2)]
        kept = reserved.update(*states)
        for one, other in zip(kept, growing.update(*states), strict=True):
            assert torch.equal(one, other)
        if length < 4:
            assert kept[0].untyped_storage().nbytes() == 2 * 3 * 6 * 5 * 4
    for layer in (reserved, growing):
        layer.crop(-3)
        layer.reorder_cache(torch.tensor([1, 0]))
    states = [torch.randn(2, 3, 1, 5, generator=generator) for _ in range(2)]
    for one, other in zip(reserved.update(*states), growing.update(*states), strict=True):
        assert torch.equal(one, other)
    reserved.reset()
    assert reserved.get_seq_length() == 0


def test_text_comes_in_pieces_and_whole() -> None:
    pieces: list[str] = []
    model, tokenizer = model_of("qwen3_moe"), tiny_tokenizer()
    made = generate(model, tokenizer, "abc", max_new_tokens=9, on_text=pieces.append)
    assert made.num_prompt_tokens == 3
    assert 1 <= len(made.token_ids) <= 9
    assert "".join(pieces).strip() == made.text.strip()
    assert made.prefill_ms > 0
    assert generate(model, tokenizer, "abc", max_new_tokens=9).token_ids == made.token_ids


def test_drawing_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    model, tokenizer = model_of("qwen3_moe"), tiny_tokenizer()
    before = torch.get_rng_state()
    drawn = [
        generate(model, tokenizer, "abc", max_new_tokens=12, temperature=2.0, seed=seed).token_ids
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(before, torch.get_rng_state())


def test_speed_is_measured() -> None:
    assert tokens_per_second(model_of("qwen3_moe"), context=8, num_tokens=4) > 0


def test_what_cannot_be_generated_is_refused() -> None:
    model, tokenizer = model_of("qwen3_moe"), tiny_tokenizer()
    with pytest.raises(UserError, match="prompt is empty"):
        generate(model, tokenizer, "")
    with pytest.raises(UserError, match="64 positions"):
        generate(model, tokenizer, "abc", max_new_tokens=62)
    with pytest.raises(UserError, match="no chat template"):
        generate(model, tokenizer, "abc", chat=True)
    with pytest.raises(SettingError, match="max_new_tokens"):
        generate(model, tokenizer, "abc", max_new_tokens=0)
    with pytest.raises(SettingError, match="temperature"):
        generate(model, tokenizer, "abc", temperature=-1.0)


def test_a_chat_goes_through_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    expected = tokenizer("<user>hello", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "hello", chat=True).tolist() == expected
