"""Measure the specimen: compression beside baselines, task accuracy, load, specialisation."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.data import tasks
from mixtura.data.corpora import split_documents, training_documents
from mixtura.data.records import Document
from mixtura.data.text import DOMAINS, held_out_tasks
from mixtura.data.tokens import encode_documents, encode_text
from mixtura.running.evaluate import bits_per_byte, task_accuracy
from mixtura.train.specimen.baselines import byte_ngram_bits, token_ngram_bits, xz_alone_bits, xz_primed_bits
from mixtura.train.specimen.recipe import recipe

NUM_HELD_OUT_TASKS = 1500
NUM_PRIMING_TASKS = 20_000
NUM_ROUTED_TOKENS = 60_000


def held_out_documents(domain: str) -> tuple[Document, ...]:
    """All held-out documents of a domain; tasks are put together as one document of many."""
    if domain != "tasks":
        return split_documents(domain, "held_out")
    made = islice(tasks.stream("held_out", recipe().seed), NUM_HELD_OUT_TASKS)
    return tuple(task.document() for task in made)


def _training_texts(domain: str) -> list[str]:
    if domain != "tasks":
        return [document.text for document in training_documents(domain)]
    made = islice(tasks.stream("training", recipe().seed + 1), NUM_PRIMING_TASKS)
    return [task.prompt + task.completion for task in made]


def compression(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Bits per byte by domain on held-out text, for the model and each baseline.

    For `xz_alone` and `xz_primed` the tasks are one file, since each is shorter than a header of
    xz; source files and pages of prose are compressed one by one in `xz_alone`.
    """
    found = {}
    for domain in DOMAINS:
        documents = held_out_documents(domain)
        texts = [document.text for document in documents]
        training = _training_texts(domain)
        size = sum(len(text.encode()) for text in texts)
        stream = [token for text in training for token in encode_text(text, tokenizer)]
        encoded = [encode_text(text, tokenizer) for text in texts]
        joined = ["\n\n".join(texts)] if domain == "tasks" else texts
        found[domain] = {
            "bytes": float(size),
            "documents": float(len(documents)),
            "model": bits_per_byte(model, tokenizer, documents)[domain],
            "token_5_gram": token_ngram_bits(stream, encoded, len(tokenizer)) / size,
            "byte_5_gram": byte_ngram_bits("\n\n".join(training), texts) / size,
            "xz_alone": xz_alone_bits(joined) / size,
            "xz_primed": xz_primed_bits("\n\n".join(training), joined) / size,
        }
    return found


def accuracy(model: Any, tokenizer: Any, num_per_task: int) -> dict[str, dict[str, dict[str, float | int]]]:
    """Exact matches by task and language on held-out tasks, beside the best constant answer."""
    counted = task_accuracy(model, tokenizer, held_out_tasks(num_per_task, recipe().seed), batch_size=64)
    return {
        task: {
            language: {
                "correct": right,
                "total": total,
                "chance": tasks.chance_level(task, language),
            }
            for language, (right, total) in by_language.items()
        }
        for task, by_language in counted.items()
    }


def routed_shares(model: Any, tokenizer: Any) -> Float[Tensor, "L N E"]:
    """For each layer and domain, the share of choices that goes to each expert, held-out text."""
    documents = [document for domain in DOMAINS for document in held_out_documents(domain)]
    batch = encode_documents(documents, tokenizer, max_tokens=NUM_ROUTED_TOKENS)
    chosen: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
        for layer in model.model.layers
    ]
    num_experts = model.config.num_experts
    counts = torch.zeros(len(model.model.layers), len(DOMAINS), num_experts, dtype=torch.float64)
    for part in batch.split(4096):
        chosen.clear()
        with torch.no_grad():
            model.model(input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False)
        valid = part.attention_mask.flatten().bool()
        domain_of = part.domains[:, None].expand_as(part.input_ids).flatten()[valid]
        for layer, ids in enumerate(chosen):
            flat = (domain_of[:, None] * num_experts + ids[valid]).flatten()
            counts[layer] += torch.bincount(flat, minlength=len(DOMAINS) * num_experts).view(-1, num_experts)
    for hook in hooks:
        hook.remove()
    order = [batch.domain_names.index(domain) for domain in DOMAINS]
    counts = counts[:, order]
    return counts / counts.sum(dim=2, keepdim=True)


def load_by_layer(shares: Float[Tensor, "L N E"]) -> list[dict[str, float | int]]:
    """Balance of each layer, domains weighing the same: fullest over mean, entropy, dead experts.

    The entropy is a share of the largest possible; an expert is dead that nothing was sent to.
    """
    rows: list[dict[str, float | int]] = []
    for load in shares.mean(dim=1):
        positive = load[load > 0]
        entropy = float(-(positive * positive.log()).sum()) / math.log(len(load))
        rows.append(
            {
                "max_over_mean": float(load.max() * len(load)),
                "min_over_mean": float(load.min() * len(load)),
                "entropy": entropy,
                "dead": int((load == 0).sum()),
            }
        )
    return rows


def specialisation(shares: Float[Tensor, "L N E"], num_top: int = 3) -> list[dict[str, Any]]:
    """How differently domains use the experts of each layer.

    `total_variation` between two domains is the share of choices that would have to move to make
    them equal: 0 for the same use, 1 for experts that are not shared. `top` names the experts that
    one domain fills most, as the domain's part of the expert's load, domains weighing the same.
    """
    rows = []
    for layer in shares:
        distances = {
            f"{DOMAINS[i]} and {DOMAINS[j]}": float((layer[i] - layer[j]).abs().sum() / 2)
            for i in range(len(DOMAINS))
            for j in range(i + 1, len(DOMAINS))
        }
        part = layer / layer.sum(dim=0).clamp_min(1e-12)
        best, owner = part.max(dim=0)
        order = best.argsort(descending=True, stable=True)[:num_top].tolist()
        top = [{"expert": e, "domain": DOMAINS[int(owner[e])], "part": float(best[e])} for e in order]
        rows.append({"total_variation": distances, "top": top})
    return rows
