"""The made-up tokens that contracts of routers and mixers are checked on, with every optional input."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods import kind
from mixtura.modeling.layer import ExpertMatrices
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=32, num_experts=8)
NUM_TOKENS = 24
NUM_WORDS = 100
LABELS = ("domain", "language", "modality", "environment", "conditional")
# Fields that a method may be unable to do without; each must be asked for by name.
NEEDED = ("sequence_ids", "positions", "token_ids", "labels", "attention", "experts")
_ALWAYS = ("x", "valid")
_BY_TOKEN = ("x", "valid", "sequence_ids", "positions", "token_ids", "attention", "state", "allowed")


def token_fields(
    seed: int, num_tokens: int = NUM_TOKENS, num_sequences: int = 2, shape: LayerShape = SHAPE
) -> dict[str, Any]:
    """A value for every field of `RouterInput` that has a meaning at a first layer.

    Sequences are of equal length, one after another; the last quarter of the tokens is padding.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.arange(num_tokens)
    length = max(-(-num_tokens // num_sequences), 1)
    positions = tokens % length
    attention = torch.rand(num_tokens, length, generator=generator)
    attention = attention * (torch.arange(length) <= positions[:, None])
    allowed = torch.rand(num_tokens, shape.num_experts, generator=generator) < 0.9
    allowed[:, :4] = True
    return {
        "x": torch.randn(num_tokens, shape.d_model, generator=generator),
        "valid": tokens < num_tokens - num_tokens // 4,
        "layer": 0,
        "step": 3,
        "training": True,
        "causal": True,
        "decoding": False,
        "sequence_ids": tokens // length,
        "positions": positions,
        "token_ids": torch.randint(0, NUM_WORDS, (num_tokens,), generator=generator),
        "labels": dict.fromkeys(LABELS, tokens % 2),
        "attention": attention / attention.sum(-1, keepdim=True),
        "selection_bias": 0.1 * torch.randn(shape.num_experts, generator=generator),
        "allowed": allowed,
        "experts": experts(seed, shape=shape),
        "generator": generator,
    }


def experts(seed: int, dtype: torch.dtype = torch.float32, shape: LayerShape = SHAPE) -> ExpertMatrices:
    """Made-up experts."""
    generator = torch.Generator().manual_seed(seed + 1)
    up = (shape.num_experts, 2 * shape.d_expert, shape.d_model)
    down = (shape.num_experts, shape.d_model, shape.d_expert)
    drawn = [torch.randn(size, generator=generator) / size[-1] ** 0.5 for size in (up, down)]
    return ExpertMatrices(drawn[0].to(dtype), drawn[1].to(dtype))


def declared(method: Subject, given: dict[str, Any]) -> RouterInput:
    """An input with those of the fields that the method's tags ask for, and randomness begun anew."""
    wanted = (*_ALWAYS, *method.tagged("reads"), *method.tagged("may_read"))
    asked = {name: value for name, value in given.items() if name in wanted}
    if asked.get("generator") is not None:
        asked["generator"] = asked["generator"].clone_state()
    return RouterInput(**asked)


def chosen(given: dict[str, Any], rows: Int[Tensor, " n"]) -> dict[str, Any]:
    """The fields of some of the tokens, in this order."""
    made = {name: value[rows] if name in _BY_TOKEN else value for name, value in given.items()}
    return made | {"labels": {name: value[rows] for name, value in given["labels"].items()}}


def converted(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The fields with everything that is of floating point in another dtype."""

    def convert(value: Any) -> Any:
        if isinstance(value, ExpertMatrices):
            return ExpertMatrices(value.gate_up.to(dtype), value.down.to(dtype))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in given.items()}


def with_later_tokens_changed(given: dict[str, Any], cut: int, seed: int) -> dict[str, Any]:
    """The fields with all that is known of tokens at position ``cut`` or later made up anew."""
    later = given["positions"] >= cut
    other = token_fields(seed, given["x"].shape[0])

    def mixed(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(later.view(-1, *[1] * (old.dim() - 1)), new, old)

    changed = {name: mixed(given[name], other[name]) for name in ("x", "token_ids", "allowed")}
    shuffled = mixed(given["attention"], given["attention"].flip(0).roll(1, 0))
    masked = shuffled * (torch.arange(shuffled.shape[1]) <= given["positions"][:, None])
    labels = {name: mixed(value, 1 - value) for name, value in given["labels"].items()}
    made = given | changed | {"attention": masked, "labels": labels}
    if given.get("state") is not None:
        made["state"] = mixed(given["state"], given["state"].flip(0))
    return made


def check_tags(method: Subject, readable: type[Any]) -> None:
    """Every tag is one of its kind's, and ``reads:`` names optional fields of the record ``readable``."""
    family = kind(method.header.kind)
    for tag in method.header.tags:
        require(
            family.explain(tag), f"{family.name} have no tag {tag!r}; there are: {', '.join(family.tags)}"
        )
    known = {item.name for item in fields(readable)}
    for name in (*method.tagged("reads"), *method.tagged("may_read")):
        require(name in known, f"reads:{name} names no field of {readable.__name__}")
