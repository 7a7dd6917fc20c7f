"""What the form chain promises beyond its kind's contract."""

from __future__ import annotations

import torch
from modeling.tiny_models import some_ids, tiny_model

from mixtura.methods import create
from mixtura.methods.forms.chain import Chain
from mixtura.modeling.forming import FormedLayer, run_layer
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def layer(form: Chain) -> FormedLayer:
    experts = Experts(SHAPE)
    passes = [MoELayer(create("routers", "top_k", SHAPE, seed=n), experts) for n in range(form.num_passes)]
    return FormedLayer(form, passes)


def tokens() -> RouterInput:
    return RouterInput.of(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))


def test_one_iteration_is_a_plain_layer_to_the_bit() -> None:
    made, inputs = layer(Chain(SHAPE, iterations=1)), tokens()
    output, _ = run_layer(made, inputs, inputs.x, [{"ties": None}])
    assert torch.equal(output, made.passes[0](inputs)[0])


def test_iterations_read_what_came_before() -> None:
    made, inputs = layer(Chain(SHAPE, iterations=3)), tokens()
    output, routings = run_layer(made, inputs, 5 * inputs.x, [{"ties": None}] * 3)
    h = inputs.x
    for one in made.passes:
        h = h + one(RouterInput.of(h))[0]
    torch.testing.assert_close(output, h - inputs.x)
    assert len(routings) == 3
    released = layer(Chain(SHAPE, iterations=3, mode="released"))
    output, _ = run_layer(released, inputs, 5 * inputs.x, [{"ties": None}] * 3)
    torch.testing.assert_close(5 * inputs.x + output, h)


def test_an_iteration_costs_a_router_and_balancers_see_each() -> None:
    plain = tiny_model({"shared_width": 8})
    chained = tiny_model({"shared_width": 8, "form": {"name": "chain", "iterations": 3}})
    sizes = [sum(one.numel() for one in model.parameters()) for model in (plain, chained)]
    assert sizes[1] - sizes[0] == 2 * 2 * 4 * 32
    output = chained(some_ids(), output_routing=True)
    assert len(output.routings) == len(chained.model.balance.layers) == 6
