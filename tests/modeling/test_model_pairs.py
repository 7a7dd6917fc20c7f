"""Every router and mixer with every balancer: what is not refused trains, is evaluated and is finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods import create, declared_tags, names
from mixtura.modeling.family import MoEPlan
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.modeling.parts import expert_rows, make_balancers
from mixtura.types import LayerShape, RouterInput

LABELS = {
    name: torch.zeros(2, dtype=torch.long)
    for name in ("domain", "language", "modality", "environment", "conditional")
}
KINDS = [("routers", name) for name in names("routers")] + [("mixers", name) for name in names("mixers")]
# What only reads scores or logits suits every method.
ALWAYS = {"z_loss", "entropy", "importance"}


def description(kind: str, name: str, balancers: list[Any]) -> dict[str, Any]:
    """An MoE layer with a method and these balancers."""
    moe = {"router": None, "mixer": None, "num_experts": 8, "balancers": balancers}
    return moe | {kind.removesuffix("s"): name} | ({"pool": 2} if name == "rex_moe" else {})


def allowed(kind: str, name: str) -> tuple[list[str], dict[str, str]]:
    """The balancers that are not refused, and of the others why."""
    method = create(kind, name, LayerShape(d_model=16, d_expert=8, num_experts=8))
    found, refused = [], {}
    for balancer in names("balancers"):
        try:
            make_balancers(MoEPlan.read(description(kind, name, [balancer])), method)
        except UserError as error:
            refused[balancer] = str(error)
        else:
            found.append(balancer)
    return found, refused


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_every_pair_that_is_not_refused_trains(kind: str, name: str) -> None:
    balancers, refused = allowed(kind, name)
    assert set(balancers) >= ALWAYS
    assert all(balancer in why and "\n" not in why for balancer, why in refused.items())
    model = tiny_model(description(kind, name, balancers)).train()
    rows = some_ids(3, 8)
    mask = torch.ones_like(rows)
    mask[1, 5:], mask[2] = 0, 0
    labels = rows.masked_fill(mask == 0, -100)
    known = {label: torch.zeros(3, dtype=torch.long) for label in LABELS}
    for _ in range(2):
        output = model(rows, attention_mask=mask, labels=labels, token_labels=known)
        torch.autograd.backward(output.loss)
        for label, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), label
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        model.end_step()
        model.zero_grad()
    held = model.model.balance.state_dict()
    assert all(torch.isfinite(value.double()).all() for value in held.values())
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(rows, attention_mask=mask, labels=labels, token_labels=known).loss)


def rows_of(name: str, kind: str) -> tuple[LayerShape, Any, Tensor | None]:
    """A method with its expert rows, if it has any."""
    shape = LayerShape(d_model=16, d_expert=8, num_experts=8)
    made = create(kind, name, shape)
    return shape, made, expert_rows(made)


@pytest.mark.parametrize(("kind", "name"), [one for one in KINDS if rows_of(one[1], one[0])[2] is not None])
def test_a_row_is_its_experts_own(kind: str, name: str) -> None:
    shape, method, rows = rows_of(name, kind)
    assert rows.shape == (8, 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, generator=generator)
    fields = {
        "sequence_ids": torch.zeros(1, dtype=torch.long),
        "positions": torch.zeros(1, dtype=torch.long),
        "token_ids": torch.ones(1, dtype=torch.long),
        "attention": torch.ones(1, 1),
        "labels": {label: torch.zeros(1, dtype=torch.long) for label in LABELS},
        "experts": Experts(shape).matrices,
    }
    asked = {
        field: value for field, value in fields.items() if f"reads:{field}" in declared_tags(type(method))
    }
    layer = MoELayer(method, Experts(shape))
    before = layer(RouterInput.of(x, **asked))[1].logits
    with torch.no_grad():
        rows[3] += 0.5 * x[0]
    after = layer(RouterInput.of(x, **asked))[1].logits
    changed = (after - before)[0]
    assert changed[3] > 0.1
    # Where others change, as those of a softmax's logarithm may, they all do alike.
    others = changed[torch.arange(8) != 3]
    assert (others <= 1e-5).all()
