"""Tiny models, planted and studied, for tests of analyses that run a model again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import tiny_model
from recording import text
from torch import Tensor

from mixtura.checkpoints.view import open_model
from mixtura.data.tokens import TokenBatch
from mixtura.running.observing import observe
from mixtura.running.observing.studying import ModelStudy, studying

TEXT = text([14, 14, 12, 9], [0, 1, 0, 1], seed=5)
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral")


@contextmanager
def studied(model: Any, *, steers: bool = False) -> Iterator[ModelStudy]:
    with studying(model, TEXT, steers=steers) as study:
        yield study


def shouting(index: int, quiet: float = 1.0) -> tuple[Any, int]:
    """A model in which the expert a layer uses most shouts and all others are scaled; and that expert."""
    model: Any = tiny_model("qwen3_moe")
    expert = int(observe(model, TEXT).layer(index).load.argmax())
    with torch.no_grad():
        for layer in open_model(model).layers:
            experts: Any = model.get_submodule(layer.name)
            loud = experts.down_proj[expert] * 100
            experts.down_proj *= quiet
            if layer.index == index:
                experts.down_proj[expert] = loud
    return model, expert


def own_words(model: Any) -> TokenBatch:
    """What a model says after a few beginnings, likeliest token by likeliest token."""
    ids = model.generate(TEXT.input_ids[:, :3], max_new_tokens=9, do_sample=False, eos_token_id=None)
    return TokenBatch(ids, torch.ones_like(ids), TEXT.domains, TEXT.domain_names)


def next_loss(logits: Tensor, after: int) -> float:
    return float(-logits.double().log_softmax(-1)[after])
