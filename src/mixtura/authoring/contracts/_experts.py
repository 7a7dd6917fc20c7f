"""Made-up assignments that contracts of experts are checked on, and what experts make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.authoring.contracts._core import Subject
from mixtura.authoring.contracts._inputs import NUM_TOKENS, SHAPE, declared, token_fields
from mixtura.errors import SettingError
from mixtura.methods.experts import Bank, runs
from mixtura.methods.settings import construct
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, Rows

# Experts compute in the dtype of their tokens: float32 here.
CLOSE = 1e-5
_CHOICES = 2


def shape_of(method: Subject) -> LayerShape:
    """The layer that experts are made for; one of a single feature where they take no other width."""
    try:
        construct(method.cls, SHAPE)
    except SettingError:
        return replace(SHAPE, d_expert=1)
    return SHAPE


def sample_fields(
    method: Subject, seed: int, num_tokens: int = NUM_TOKENS, num_sequences: int = 2
) -> dict[str, Any]:
    """A value for every field of `RouterInput`, and as ``assigned [T, 2]`` the experts of each token."""
    shape = shape_of(method)
    made = token_fields(seed, num_tokens, num_sequences, shape=shape) | {"generator": None}
    first = torch.arange(num_tokens) % shape.num_experts
    # Two that differ, so that all experts and all pairs of kinds have tokens.
    assigned = torch.stack([first, (first + 1 + first // 3) % shape.num_experts], dim=1)
    return made | {"assigned": assigned}


def rows_of(method: Subject, given: Mapping[str, Any]) -> Rows:
    """The assignments of valid tokens, with the fields that the method's tags ask for."""
    shape = shape_of(method)
    assigned: Int[Tensor, "T K"] = given["assigned"]
    wanted = {name: value for name, value in given.items() if name != "assigned"}
    inputs = declared(method, wanted)
    token_ids = torch.arange(len(assigned))[:, None].expand_as(assigned).flatten()
    kept = inputs.valid[token_ids].nonzero().squeeze(-1)
    order = kept[torch.sort(assigned.flatten()[kept], stable=True).indices]
    return Rows.of(inputs.x, token_ids[order], assigned.flatten()[order], shape.num_experts, inputs)


def all_rows(x: Float[Tensor, "T D"], num_experts: int) -> Rows:
    """Every token with every expert."""
    expert_ids = torch.arange(num_experts).repeat_interleave(len(x))
    return Rows.of(x, torch.arange(len(x)).repeat(num_experts), expert_ids, num_experts)


def only(rows: Rows, places: Int[Tensor, " n"]) -> Rows:
    """Some of the assignments, in the same order."""
    count = rows.offsets.shape[0]
    return Rows.of(rows.x, rows.token_ids[places], rows.expert_ids[places], count, rows.inputs)


def use(bank: Bank, rows: Rows) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What experts make of their rows, and what they remember."""
    if runs(type(bank)):
        ran = bank.run(rows)
        return ran.outputs, ran.history
    return Experts(bank).matrices.run(rows.x, rows.token_ids, rows.expert_ids), {}
