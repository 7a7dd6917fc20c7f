"""Super experts in whole models: a planted one is found, protected, and what hurts when it goes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import tiny_model
from recording import text
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.checkpoints.view import drop_experts, open_model
from mixtura.methods import create, names
from mixtura.methods.analyses.super_experts import SuperExperts
from mixtura.running.observing import observe
from mixtura.types import Budget

TEXT = text([20, 31, 12, 25], [0, 1, 0, 1], seed=5)
LAYER, EXPERT = 1, 6


def planted(family: str, factor: float = 300.0) -> nn.Module:
    """A tiny model one of whose experts has a huge down projection."""
    model = tiny_model(family)
    experts: Any = model.get_submodule(open_model(model).layer(LAYER).name)
    with torch.no_grad():
        experts.down_proj[EXPERT] *= factor
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    made: Tensor = model(input_ids=TEXT.input_ids, attention_mask=TEXT.attention_mask, use_cache=False).logits
    return made[TEXT.attention_mask.bool()]


def divergence(model: nn.Module, drops: dict[int, list[int]]) -> float:
    """Mean KL divergence that dropping experts makes."""
    before, after = logits(model), logits(drop_experts(copy.deepcopy(model), drops))
    return float(
        F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    )


def test_a_planted_expert_is_the_one_that_is_found() -> None:
    for family in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        trace = observe(planted(family), TEXT, statistics=["max_output"])
        # The tiny models have too few experts for half a percent of them to be one.
        assert SuperExperts(percentile=90).find(trace) == {LAYER: (EXPERT,)}


def test_protected_it_stays_under_every_criterion() -> None:
    trace = observe(planted("qwen3_moe"), TEXT, statistics=names("statistics"))
    protected = SuperExperts(percentile=90).find(trace)
    for name in names("pruners"):
        plan = create("pruners", name).plan(trace, Budget(num_experts=2, protected=protected))
        assert EXPERT not in plan.dropped()[LAYER]


def test_dropping_it_hurts_more_than_dropping_any_other() -> None:
    model = planted("qwen3_moe")
    found = {expert: divergence(model, {LAYER: [expert]}) for expert in range(8)}
    assert max(found, key=lambda expert: found[expert]) == EXPERT
    assert found[EXPERT] > 1.5 * sorted(found.values())[-2]
