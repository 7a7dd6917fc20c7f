"""Balancers that would act on nothing beside a router are refused, whichever of the two comes first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rerouted import gates, model_of, texts

import mixtura
from mixtura.errors import UserError

IDS = texts(4, 8)
REFUSED = [
    ("loss_free", "expert_choice", "reads no selection bias"),
    ("loss_free", "sinkhorn", "reads no selection bias"),
    ("moec", "sinkhorn", "does not read which experts are allowed"),
    ("moec", "vmoe", "does not read which experts are allowed"),
    ("moec", "re_moe", "does not read which experts are allowed"),
    ("re_moe_l1", "top_k", "made for the router re_moe"),
    ("erc_loss", "re_moe", "no matrix with a row for each that is like the experts' inputs"),
    ("erc_loss", "x_moe", "no matrix with a row for each that is like the experts' inputs"),
]


def state_of(model: Any) -> list[set[str]]:
    """The attributes of each router module."""
    return [set(dict(gate.named_children())) for gate in gates(model)]


@pytest.mark.parametrize(("balancer", "router", "message"), REFUSED)
@pytest.mark.parametrize("balance_first", [False, True])
def test_what_does_not_suit_is_refused_in_either_order(
    balancer: str, router: str, message: str, balance_first: bool
) -> None:
    model = model_of("qwen3_moe")
    if balance_first and balancer == "re_moe_l1":
        mixtura.set_router(model, "re_moe", train=True)
    if balance_first:
        mixtura.balance(model, balancer)
        before = state_of(model)
        with pytest.raises(UserError, match=message):
            mixtura.set_router(model, router, train=True)
    else:
        mixtura.set_router(model, router, train=True)
        before = state_of(model)
        with pytest.raises(UserError, match=message):
            mixtura.balance(model, balancer)
    assert state_of(model) == before


@pytest.mark.parametrize("balance_first", [False, True])
def test_one_layer_that_does_not_suit_is_enough(balance_first: bool) -> None:
    model = model_of("qwen3_moe")
    if balance_first:
        mixtura.balance(model, "loss_free")
        with pytest.raises(UserError, match="reads no selection bias"):
            mixtura.set_router(model, "sinkhorn", layers=[1])
    else:
        mixtura.set_router(model, "sinkhorn", layers=[1])
        with pytest.raises(UserError, match="reads no selection bias"):
            mixtura.balance(model, "loss_free")
    assert not any("mixtura_balance" in names for names in state_of(model)) or balance_first


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_either_order_balances_alike(family: str) -> None:
    found = []
    for balance_first in (False, True):
        model = model_of(family).train()
        for gate in gates(model):
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(1))
        router = "deepseek_v3" if family == "deepseek_v3" else "top_k"
        steps = [
            lambda m=model, r=router: mixtura.set_router(m, r),  # type: ignore[misc]
            lambda m=model: mixtura.balance(m, [("loss_free", {"rate": 0.01}), "switch_loss"]),  # type: ignore[misc]
        ]
        made = [step() for step in (reversed(steps) if balance_first else steps)]
        balanced = made[0] if balance_first else made[1]
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        balanced.end_step()
        found.append((loss.detach(), torch.stack(list(balanced.biases().values()))))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_experts_coupled_to_rows_read_those_that_decide() -> None:
    model = model_of("qwen3_moe").train()
    mixtura.set_router(model, "ada_moe", num_null=2)
    made = mixtura.balance(model, "erc_loss", coefficient=100.0)
    slopes = []
    for coupled in (True, False):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        assert made.loss is not None
        (loss if coupled else loss - made.loss).backward()
        slopes.append(gates(model)[0].weight.grad.clone())
    assert (slopes[0] - slopes[1]).abs().max() > 1e-4
