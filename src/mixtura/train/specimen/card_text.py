"""The words of the specimen's card around its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixtura.train.specimen.recipe import VOCABULARY, recipe

HEADER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, de, fr, es]
tags: [mixture-of-experts, mixtura]
---

# The specimen of mixtura

A small, really trained mixture-of-experts language model in the shape of Qwen3-MoE. It ships inside
the package so that every command runs in seconds with no network, and so that whatever claims to
keep a model's quality has a quality to lose. It is a specimen to work on, not an assistant: it does
small sums step by step, continues Python source, and knows nothing of the world.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown, from the figures of `card.json`."""
    parts = [
        HEADER,
        _compression(card),
        _accuracy(card),
        _load(card),
        _specialisation(card),
        _recipe(card),
    ]
    return "\n".join(parts)


def _compression(card: dict[str, Any]) -> str:
    names = {
        "model": "specimen",
        "token_5_gram": "5-gram of tokens",
        "byte_5_gram": "5-gram of bytes",
        "xz_alone": "xz, file alone",
        "xz_primed": "xz after the training text",
    }
    rows = [
        [domain, f"{values['bytes'] / 1000:.0f} kB", *(f"{values[key]:.3f}" for key in names)]
        for domain, values in card["compression"].items()
    ]
    warning = f"\nNote: {card['text_warning']}.\n" if card["text_warning"] else ""
    return f"""## Bits per byte on held-out text

{table(["domain", "size", *names.values()], rows)}

Held-out text is fixed by file name and digest (`mixtura/data/held_out.json`) and was not trained on;
nor was any of a task's problems as a problem of that task, in any language (a sum can occur inside a
word problem that was). The 5-gram models (Witten-Bell) learnt the same
training text; xz is at its strongest setting. For tasks both xz figures are of one file of all tasks.
{warning}"""


def _accuracy(card: dict[str, Any]) -> str:
    languages = sorted({code for by_language in card["accuracy"].values() for code in by_language})
    rows = []
    for task, by_language in card["accuracy"].items():
        right = sum(cell["correct"] for cell in by_language.values())
        total = sum(cell["total"] for cell in by_language.values())
        chance = sum(cell["chance"] * cell["total"] for cell in by_language.values()) / total
        cells = [
            f"{100 * by_language[code]['correct'] / by_language[code]['total']:.0f} %"
            if code in by_language
            else "-"
            for code in languages
        ]
        rows.append([task, *cells, f"{100 * right / total:.0f} %", str(total), f"{100 * chance:.0f} %"])
    return f"""## Tasks answered exactly

{table(["task", *languages, "all", "questions", "chance"], rows)}

Greedy generation with worked steps; only the last answer line is judged. Chance is the best constant
answer. Numbers go up to 99 (products, sums and compared numbers further).
"""


def _load(card: dict[str, Any]) -> str:
    rows = [
        [
            str(layer),
            f"{row['max_over_mean']:.2f}",
            f"{row['min_over_mean']:.2f}",
            f"{row['entropy']:.3f}",
            str(row["dead"]),
        ]
        for layer, row in enumerate(card["load"])
    ]
    return f"""## Load of the experts

{table(["layer", "fullest / mean", "emptiest / mean", "entropy (1 is even)", "dead experts"], rows)}

Measured on held-out text, the three domains weighing the same.
"""


def _specialisation(card: dict[str, Any]) -> str:
    pairs = list(card["specialisation"][0]["total_variation"])
    rows = []
    for layer, row in enumerate(card["specialisation"]):
        top = ", ".join(f"{one['expert']} ({one['domain']} {100 * one['part']:.0f} %)" for one in row["top"])
        rows.append([str(layer), *(f"{row['total_variation'][pair]:.2f}" for pair in pairs), top])
    return f"""## How experts specialise by domain

{table(["layer", *pairs, "most specialised experts"], rows)}

Numbers between two domains are total variation distances of how they share out their choices among
the experts: 0 means the same use, 1 no expert in common. In brackets, the domain that fills the
expert most and its part of the expert's load; an unspecialised expert would have 33 %.
"""


def _recipe(card: dict[str, Any]) -> str:
    facts = card["training"]
    decay = (
        f"decayed over the last {facts['steps'] - facts['decay_start']} of them"
        if facts["decay_start"] is not None and facts["steps"] > facts["decay_start"]
        else "not yet decayed"
    )
    data, steps, model = recipe().data, recipe().training, recipe().model
    moe = model["moe"]
    stages = "; ".join(
        ("then on" if stage.until is None else f"until step {stage.until}")
        + ": "
        + ", ".join(f"{100 * share:.0f} % {name}" for name, share in stage.shares.items())
        + f", numbers up to {stage.largest}"
        for stage in data.stages
    )
    size = f"{steps.num_sequences} × {data.sequence_length}"
    shape = (
        f"{model['num_hidden_layers']} layers of {moe['num_experts']} experts, "
        f"{moe['router']['top_k']} chosen for each token, width {model['hidden_size']}, "
        f"expert width {moe['d_expert']}, vocabulary {VOCABULARY}"
    )
    optimizer = (
        f"AdamW, peak rate {steps.learning_rate:g}, warm-up {steps.warmup_steps} steps, "
        f"weight decay {steps.weight_decay:g}, float32"
    )
    return f"""## How it was trained

- Shape: {shape}
  (byte-level BPE, every digit a token), context {data.sequence_length};
  {card["parameters"] / 1e6:.1f} million parameters, {card["checkpoint_bytes"] / 1e6:.1f} MB in bfloat16.
- Text: the Python {facts["python"]} standard library's source ("code"), its language reference and
  docstrings ("prose", English), and generated tasks with worked steps in four languages ("tasks").
  Nothing was downloaded. Digest of the training text:
  `{facts["text_sha256"]}`.
- Curriculum: {stages}.
- {facts["steps"]} steps of {size} tokens, {facts["tokens"] / 1e6:.1f} million
  tokens in all, {decay}; {optimizer}.
  Seed {facts["seed"]}.
- Balance: for each layer by itself, over the whole batch of mixed domains,
  weight {moe["balancers"][0]["coefficient"]:g}.
- {facts["hours"]} hours on {facts["hardware"]}, shared with other work; Python {facts["python"]},
  torch {facts["torch"]}, transformers {facts["transformers"]}; {facts["date"]}.

`make specimen` trains another by this recipe, which is a configuration of `mixtura train`
(`mixtura/train/specimen/recipe.yaml`); `python -m mixtura.train.specimen.card` measures the figures again
({card["minutes_to_measure"]} minutes).
"""
