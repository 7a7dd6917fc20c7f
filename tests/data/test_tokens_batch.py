"""Documents to padded batches, and measuring a model on them."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixtura.data.records import Document
from mixtura.data.text import held_out_tasks
from mixtura.data.tokens import encode_documents, encode_text
from mixtura.errors import SettingError
from mixtura.running.evaluate import bits_per_byte, generate_completions, task_accuracy, text_bits


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token; texts begin with <s>, which is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def tiny_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        eos_token_id=256,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).eval()


DOCUMENTS = (
    Document("a" * 30, "one", "x"),
    Document("b" * 300, "two", "y"),
    Document("c" * 5, "one", "z"),
)


def test_batch_is_padded_masked_and_labelled() -> None:
    batch = encode_documents(DOCUMENTS, byte_tokenizer(), max_length=64)
    assert batch.domain_names == ("one", "two")
    lengths = batch.attention_mask.sum(dim=1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert batch.num_tokens == 31 + 301 + 6
    assert batch.input_ids.shape == (batch.num_sequences, 64)
    letters = {0: {"a", "c"}, 1: {"b"}}
    for ids, mask, domain in zip(batch.input_ids, batch.attention_mask, batch.domains.tolist(), strict=True):
        real = byte_tokenizer().decode(ids[mask.bool()], skip_special_tokens=True)
        assert set(real) <= letters[domain]
        assert not ids[~mask.bool()].any()


def test_domains_are_filled_evenly_under_a_limit() -> None:
    many = [Document("q" * 40, "small", f"s{i}") for i in range(50)]
    batch = encode_documents([Document("b" * 5000, "two", "y"), *many], byte_tokenizer(), 64, max_tokens=1000)
    sizes = [int(batch.attention_mask[batch.domains == d].sum()) for d in range(2)]
    assert sum(sizes) <= 1001
    assert abs(sizes[0] - sizes[1]) <= 64


def test_split_keeps_every_token_once() -> None:
    batch = encode_documents(DOCUMENTS, byte_tokenizer(), max_length=64)
    parts = list(batch.split(130))
    assert sum(part.num_tokens for part in parts) == batch.num_tokens
    assert torch.equal(torch.cat([part.domains for part in parts]), batch.domains)
    for part in parts:
        assert part.num_sequences == 1 or part.input_ids.numel() <= 130
        assert part.attention_mask.sum(dim=1).max() == part.input_ids.shape[1]


def test_a_start_token_in_the_text_is_not_doubled() -> None:
    tokenizer = byte_tokenizer()
    assert encode_text("<s>hi", tokenizer) == encode_text("hi", tokenizer)


def test_sizes_and_empty_text_are_refused() -> None:
    with pytest.raises(SettingError, match="at least 2"):
        encode_documents(DOCUMENTS, byte_tokenizer(), max_length=1)
    with pytest.raises(SettingError, match="no text to encode"):
        encode_documents([], byte_tokenizer())


def test_bits_of_a_short_text_are_its_log_probability() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    ids = torch.tensor([encode_text("hello world", tokenizer)])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    wanted = -sum(float(logs[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)) / math.log(2)
    assert text_bits(model, tokenizer, "hello world") == pytest.approx(wanted, rel=1e-5)


def test_windows_count_every_byte_once() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for size in (5, 16, 17, 40, 101):
        found = bits_per_byte(model, tokenizer, [Document("x" * size, "d", "n")], max_length=16)
        assert found["d"] == pytest.approx(math.log2(260), rel=1e-5)


def test_left_padding_does_not_change_completions() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    prompts = ["Question: a", "Q", "A much longer question than the others: b"]
    together = generate_completions(model, tokenizer, prompts, 8)
    assert together == [generate_completions(model, tokenizer, [p], 8)[0] for p in prompts]


def test_task_accuracy_counts_every_task_by_language() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model()
    tasks = held_out_tasks(4)[:24]
    counts = task_accuracy(model, tokenizer, tasks, batch_size=8)
    assert sum(total for by in counts.values() for _, total in by.values()) == 24
    assert all(right <= total for by in counts.values() for right, total in by.values())
