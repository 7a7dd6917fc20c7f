"""Measure a model on text and tasks: exact-match accuracy and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mixtura.data.records import Document, Task
from mixtura.data.tokens import encode_text, encode_texts, num_embeddings_of, pad_id
from mixtura.running.decoding import decoding_config

EXTRA_TOKENS = 16


def generate_completions(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy completions of prompts as one batch padded on the left, special tokens removed."""
    num_embeddings = num_embeddings_of(model.config)
    encoded = encode_texts(prompts, tokenizer, num_embeddings)
    width = max(len(ids) for ids in encoded)
    # It also stands after a completion that has ended, and is not shown there.
    pad = pad_id(tokenizer, num_embeddings, ("pad_token_id", "eos_token_id"))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=decoding_config(model, max_new_tokens=max_new_tokens, pad_token_id=pad),
        )
    return [str(text) for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def task_accuracy(
    model: Any, tokenizer: Any, tasks: Sequence[Task], batch_size: int = 32
) -> dict[str, dict[str, tuple[int, int]]]:
    """Exact matches of the final answer: task, then language, to (correct, total).

    The model answers greedily; it may use as many tokens as the worked solution and a few more.
    Tasks are batched by the length of their solution, so that short ones do not wait for long ones.
    """
    needs = [len(encode_text(task.completion, tokenizer)) + EXTRA_TOKENS for task in tasks]
    order = sorted(range(len(tasks)), key=lambda place: needs[place])
    counts: dict[str, dict[str, list[int]]] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        chosen = [tasks[place] for place in places]
        limit = max(needs[place] for place in places)
        completions = generate_completions(model, tokenizer, [task.prompt for task in chosen], limit)
        for task, completion in zip(chosen, completions, strict=True):
            count = counts.setdefault(task.task, {}).setdefault(task.language, [0, 0])
            count[0] += task.is_correct(completion)
            count[1] += 1
    return {
        task: {language: (right, total) for language, (right, total) in sorted(by_language.items())}
        for task, by_language in sorted(counts.items())
    }


def text_bits(model: Any, tokenizer: Any, text: str, max_length: int = 512) -> float:
    """Bits a model needs for a text: minus the base-2 logarithm of its probability.

    Longer texts are read in windows that overlap by half, so that all but the first tokens are
    predicted from at least `max_length / 2` tokens before them. Without a start token the first
    token is not counted.
    """
    ids = torch.tensor(encode_text(text, tokenizer, num_embeddings_of(model.config)))
    device = next(model.parameters()).device
    nats, done, start = 0.0, 1, 0
    while done < len(ids):
        window = ids[start : start + max_length].to(device)
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        first = done - start
        nats += float(F.cross_entropy(logits[first - 1 : -1], window[first:], reduction="sum"))
        done = start + len(window)
        start += max_length // 2
    return nats / math.log(2)


def bits_per_byte(
    model: Any, tokenizer: Any, documents: Sequence[Document], max_length: int = 512
) -> dict[str, float]:
    """Bits per UTF-8 byte of documents by domain; see `text_bits`."""
    bits: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for document in documents:
        spent = text_bits(model, tokenizer, document.text, max_length)
        bits[document.domain] = bits.get(document.domain, 0.0) + spent
        sizes[document.domain] = sizes.get(document.domain, 0) + len(document.text.encode())
    return {domain: bits[domain] / sizes[domain] for domain in sorted(bits)}
