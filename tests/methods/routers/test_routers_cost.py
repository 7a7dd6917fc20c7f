"""Routers that take more than twice top-k's time say why; what they make of fixed weights is made once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtura.methods import create, header, names
from mixtura.methods.routers import Router
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, RouterInput

RESULTS = Path(__file__).parents[3] / "benchmarks/results/routers.json"
SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)
# Each with the name of a weight that it makes something of.
REMADE = {"hyper_router": "embedding", "loc_moe": "weight", "moe_x": ""}


def test_what_is_measured_above_twice_top_k_has_its_reason_on_its_page() -> None:
    measured: list[dict[str, Any]] = json.loads(RESULTS.read_text())["results"]
    phases = {(one["width"], one["phase"], one["num_tokens"]) for one in measured}
    assert {(width, phase) for width, phase, _ in phases} == {
        (width, phase) for width in ("OLMoE", "Qwen3-30B-A3B") for phase in ("inference", "training")
    }
    slow = {one["router"] for one in measured if one["over_top_k"] > 2} & set(names("routers"))
    silent = [name for name in sorted(slow) if len(header("routers", name).sections.get("Cost", "")) < 50]
    assert not silent, f"say under Cost why these take more than twice top-k's time: {silent}"
    by_router = {name: sum(one["router"] == name for one in measured) for name in slow}
    assert set(by_router.values()) == {len(phases)}


def made(name: str) -> tuple[Router, RouterInput, torch.Tensor]:
    """A router in evaluation, tokens, and a weight that it makes something of."""
    router: Router = create("routers", name, SHAPE)
    experts = Experts(SHAPE)
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    weight = router.get_parameter(REMADE[name]) if REMADE[name] else experts.gate_up_proj
    return router.eval(), RouterInput.of(x, experts=experts.matrices), weight


@pytest.mark.parametrize("name", REMADE)
@pytest.mark.parametrize("way", ["in place", "data", "training", "no_grad step"])
def test_changed_weights_are_noticed(name: str, way: str) -> None:
    router, inputs, weight = made(name)
    with torch.inference_mode():
        first = router(inputs).logits
        assert torch.equal(router(inputs).logits, first)
    factor = torch.linspace(-1, 2, weight.numel()).view_as(weight)
    if way == "data":
        weight.data.mul_(factor)
    elif way == "training":
        router.train()
        router(inputs).weights.sum().backward()
        assert weight.grad is not None
        weight.data.mul_(factor)
        router.eval()
    else:
        with torch.no_grad():
            weight.mul_(factor)
    with torch.no_grad():
        again = router(inputs).logits
    fresh = router(inputs).logits
    torch.testing.assert_close(again, fresh)
    assert not torch.allclose(again, first)


@pytest.mark.parametrize("name", REMADE)
def test_copies_are_their_own_and_gradients_are_whole(name: str) -> None:
    router, inputs, weight = made(name)
    with torch.inference_mode():
        first = router(inputs).logits
    copied = copy.deepcopy(router)
    with torch.no_grad():
        torch.testing.assert_close(copied(inputs).logits, first)
    # Evaluated with gradients, nothing that was kept without is used.
    router(inputs).weights.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
