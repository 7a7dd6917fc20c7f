"""What the adapter scale_zero promises beyond its kind's contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapting.adapted_models import dense, logits, stir
from methods.adapters.adapter_inputs import X, stirred
from methods.adapters.adapter_sites import linear_site
from peft import get_peft_model

import mixtura
from mixtura.adapting.changing import add_to_rows, changed_weight
from mixtura.methods import load_method
from mixtura.types import Progress, RouterInput


def test_scale_zero_adds_a_lora_a_stage_and_keeps_the_others() -> None:
    made = stirred("scale_zero", rank=3, alpha=6.0, num_stages=3)
    weight = torch.randn(20, 16, dtype=torch.float64)
    # What is learned of next, once a step is made.
    for step, stage in ((0, 0), (8, 0), (9, 1), (10, 1), (19, 2), (29, 2)):
        made.before_step(Progress(step=step, num_steps=30))
        assert int(made.stage) == stage
        wanted = (1 + 0.2 * math.tanh(made.theta[0])) * weight
        for j in range(stage + 1):
            factor = 1 + 0.2 * math.tanh(made.theta[j + 1])
            wanted = wanted + factor * 2.0 * made.b[j][0] @ made.a[j][0]
        change = made.change(RouterInput.of(X[:0]))
        torch.testing.assert_close(changed_weight(weight, change), wanted)
        bias = torch.randn(20, dtype=torch.float64)
        rows = add_to_rows(X @ weight.T + bias, X, change, bias)
        torch.testing.assert_close(rows, X @ wanted.T + bias)


def test_only_the_lora_of_its_stage_and_earlier_factors_learn() -> None:
    made = stirred("scale_zero", rank=3, num_stages=3)
    for step, stage, trained in ((0, 0, []), (9, 0, []), (10, 1, [0, 1]), (25, 2, [0, 1, 2])):
        if step:
            made.before_step(Progress(step=step - 1, num_steps=30))
        change = made.change(RouterInput.of(X[:0]))
        changed_weight(torch.ones(20, 16, dtype=torch.float64), change).square().sum().backward()
        made.before_step(Progress(step=step, num_steps=30))
        assert [j for j in range(3) if made.a[j].grad is not None] == [stage]
        assert made.theta.grad.nonzero()[:, 0].tolist() == trained
        made.zero_grad()


def test_entering_a_stage_changes_nothing() -> None:
    made = load_method("adapters", "scale_zero")(linear_site(2), rank=3, num_stages=2)
    with torch.no_grad():
        made.b[0].normal_()
    before = made.change(RouterInput.of(X[:0]))
    made.before_step(Progress(step=4, num_steps=10))
    assert int(made.stage) == 1
    after = made.change(RouterInput.of(X[:0]))
    base = torch.zeros(20, 16)
    assert torch.equal(changed_weight(base, before), changed_weight(base, after))


def test_every_step_of_a_stage_is_learned_from() -> None:
    """With one step in each stage, each LoRA has learned by plain steps what its own gradient says."""
    made = load_method("adapters", "scale_zero")(linear_site(2), rank=3, alpha=6.0, num_stages=3).double()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    base = torch.randn(20, 16, dtype=torch.float64)
    for stage in range(3):
        optimizer.zero_grad()
        weight = changed_weight(base, made.change(RouterInput.of(X[:0])))
        weight.square().sum().backward()
        # d/dB of a sum of squares of W + s B A, by hand.
        factor = (1 + 0.2 * made.theta[stage + 1].tanh()).detach() * 2.0
        wanted = made.b[stage][0].detach() - 0.1 * factor * 2 * weight.detach() @ made.a[stage][0].detach().T
        before = [one.detach().clone() for one in made.b]
        made.before_step(Progress(step=stage, num_steps=3))
        optimizer.step()
        torch.testing.assert_close(made.b[stage][0].detach(), wanted)
        for other in range(3):
            assert other == stage or torch.equal(made.b[other], before[other])


def test_trained_again_it_keeps_what_every_stage_has_learned() -> None:
    made = stirred("scale_zero", rank=3, num_stages=3)
    made.before_step(Progress(step=29, num_steps=30))
    weight = torch.randn(20, 16, dtype=torch.float64)
    wanted = changed_weight(weight, made.change(RouterInput.of(X[:0])))
    for step in range(2):
        made.zero_grad()
        found = changed_weight(weight, made.change(RouterInput.of(X[:0])))
        assert torch.equal(found, wanted)
        found.square().sum().backward()
        made.before_step(Progress(step=step, num_steps=30))
        assert [j for j in range(3) if made.a[j].grad is not None] == [2]


def both(order: list[str]) -> Any:
    """Stages of LoRAs and a plain LoRA beside them."""
    config = mixtura.AdapterConfig(method="scale_zero", settings={"rank": 2, "reach": 0.9})
    model = get_peft_model(dense(), config).double().eval()
    model.add_adapter("plain", mixtura.AdapterConfig(method="lora", settings={"rank": 2}))
    model = model.double()
    stir(model, scale=0.6)
    model.base_model.set_adapter(order)
    return model


@pytest.mark.parametrize("order", [["default", "plain"], ["plain", "default"]])
def test_its_factor_is_of_the_base_alone_whatever_other_adapters_add(order: list[str]) -> None:
    model = both(order)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer: Any = model.get_submodule(name)
    own, plain = layer.mixtura_adapter["default"], layer.mixtura_adapter["plain"]
    with torch.no_grad():
        before = layer.base_layer.weight.clone()
        wanted = (1 + 0.9 * own.theta[0].tanh()) * before
        wanted += (1 + 0.9 * own.theta[1].tanh()) * 8.0 * own.b[0][0] @ own.a[0][0]
        wanted += 8.0 * plain.b[0] @ plain.a[0]
        x = torch.randn(5, 16, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ wanted.T)
        whole = logits(model)
        for merged in ([order[0]], [order[1]], order):
            model.merge_adapter(merged)
            torch.testing.assert_close(layer(x), x @ wanted.T)
            torch.testing.assert_close(logits(model), whole)
            if merged == order:
                torch.testing.assert_close(layer.base_layer.weight, wanted)
            model.unmerge_adapter()
            assert torch.equal(layer.base_layer.weight, before)
