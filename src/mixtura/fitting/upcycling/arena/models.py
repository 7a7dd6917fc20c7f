"""What the arena of upcyclers begins with: small dense models, trained here, and how all are trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import specimen
from mixtura.train.arena.text import Text, labels_of
from mixtura.train.text import Sequences, Stream, collate, training_texts

LENGTH, PER_STEP = 128, 4
TOKENS_PER_STEP: Final = LENGTH * PER_STEP
_PROMPTS, _PROMPT_CHARS = 8, 400
_WARMUP = 10


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps of the dense model on all text, of each specialist on its domain, and of all on all text."""

    dense: int = 200
    special: int = 50
    further: int = 80

    @property
    def rate(self) -> float:
        """The learning rate at its peak, of all trainings."""
        return 2e-3


def small_dense(vocab_size: int, seed: int) -> Any:
    """A fresh dense model, as transformers knows it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def sources(folder: Path, text: Text, seed: int, steps: Steps) -> tuple[Path, dict[str, Path]]:
    """The dense model and, by domain, what further training on that domain made of it; trained once."""
    base = kept_model(
        folder / "dense", partial(_trained_dense, None, text.streams, text, seed, steps.dense, steps.rate)
    )
    made = {}
    for number, (domain, stream) in enumerate(text.streams.items(), start=1):
        own_seed, own = seed + 1000 * number, {domain: stream}
        made[domain] = kept_model(
            folder / domain, partial(_trained_dense, base, own, text, own_seed, steps.special, steps.rate)
        )
    return base, made


def prompts_of(domains: Mapping[str, Path], seed: int, file: Path) -> Path:
    """A file of prompts for each specialist, of its domain's training text."""
    found = {
        str(place): [one[:_PROMPT_CHARS] for one in training_texts(domain, seed)[:_PROMPTS]]
        for place, domain in enumerate(domains)
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return file


def train(model: Any, streams: Mapping[str, Stream], seed: int, num_steps: int, rate: float) -> None:
    """Train a model of transformers, or one of mixtura's own, whose balancers are told of steps."""
    data = Sequences(streams, num_steps * PER_STEP, LENGTH, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    own = hasattr(model, "end_step")
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / _WARMUP, (num_steps - step) / (num_steps / 3))
        batch = collate([data[step * PER_STEP + place] for place in range(PER_STEP)])
        told = {"token_labels": labels_of(batch["token_labels"]["domain"])} if own else {}
        model(input_ids=batch["input_ids"], labels=batch["labels"], **told).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if own:
            model.end_step()
    model.eval()


@torch.no_grad()
def held_out_loss(model: Any, text: Text) -> float:
    """Nats a token on held-out text, a mean over domains."""
    model.eval()
    losses = []
    for part in text.held_out:
        own = {"use_cache": False}
        parts = [model(input_ids=ids, labels=ids, **own).loss for ids in part.input_ids.split(8)]
        losses.append(float(torch.stack(parts).mean()))
    return sum(losses) / len(losses)


def _trained_dense(
    start: Path | None, streams: Mapping[str, Stream], text: Text, seed: int, num_steps: int, rate: float
) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = (
        small_dense(text.vocab_size, seed) if start is None else AutoModelForCausalLM.from_pretrained(start)
    )
    train(model, streams, seed, num_steps, rate)
    return model


def kept_model(folder: Path, make: Any) -> Path:
    """A model that was trained before, or is now: whole or not at all."""
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        make().save_pretrained(aside)
        load_tokenizer(specimen.path()).save_pretrained(aside)
        aside.rename(folder)
    return folder
