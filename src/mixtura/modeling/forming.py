"""Layers of several passes, or of a pass with something before and behind it: how a form runs in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods import declared_tags
from mixtura.methods.forms import Form
from mixtura.modeling.layer import MoELayer, uses_experts
from mixtura.types import RouterInput, Routing


@final
class FormedLayer(nn.Module):
    """A form and the passes that it is made of.

    Args:
        form: a method of the kind forms.
        passes: as many layers as the form has passes.

    Raises:
        UserError: there are more or fewer, or the form has routers read other tokens than experts and one of
            them runs or reads the experts.
    """

    def __init__(self, form: Form, passes: Sequence[MoELayer]) -> None:
        super().__init__()
        name = type(form).__name__
        if len(passes) != form.num_passes:
            raise UserError(f"{name} has {form.num_passes} passes, got {len(passes)}; make as many")
        if "routes_apart" in declared_tags(type(form)):
            for router in (one.router for one in passes):
                if uses_experts(router):
                    raise UserError(
                        f"{name} has routers read other tokens than experts, but {type(router).__name__} "
                        "runs or reads the experts itself; choose a router that only chooses, or no form"
                    )
        self.form = form
        self.passes = nn.ModuleList(passes)


def passes_of(layer: object) -> tuple[MoELayer, ...]:
    """The passes of a decoder layer's feed-forward part, in order; none of a dense one."""
    held = layer.passes if isinstance(layer, FormedLayer) else (layer,)
    return tuple(one for one in held if isinstance(one, MoELayer))


def run_layer(
    layer: nn.Module,
    inputs: RouterInput,
    residual: Float[Tensor, "T D"],
    told: Sequence[Mapping[str, Any]],
) -> tuple[Float[Tensor, "T D"], tuple[Routing, ...]]:
    """What a layer adds to each token, and the routing of each of its passes.

    Args:
        layer: a pass, or a form with its passes.
        inputs: the normed tokens and what all passes are told.
        residual: the tokens before the norm.
        told: what each pass is told besides; its ``ties`` are those of experts.

    Raises:
        UserError: a form leaves out a pass, or calls one twice or out of order.
    """
    routings: list[Routing] = []

    def run(turn: int, block: MoELayer, x: Tensor, route: Tensor | None = None) -> Tensor:
        if turn != len(routings):
            raise UserError(f"{type(layer.form).__name__} must call its passes once each, in order")
        fields = {name: value for name, value in told[turn].items() if name != "ties"}
        if routings:
            fields["state"] = routings[-1].state
        read = replace(inputs, x=x if route is None else route, turn=turn, **fields)
        output, routing = block(read, told[turn]["ties"], None if route is None else x)
        routings.append(routing)
        kept: Tensor = output
        return kept

    passes = passes_of(layer)
    runs = [partial(run, turn, block) for turn, block in enumerate(passes)]
    if not isinstance(layer, FormedLayer):
        return runs[0](inputs.x), tuple(routings)
    output = layer.form(inputs.x, residual, runs)
    if len(routings) != len(passes):
        raise UserError(f"{type(layer.form).__name__} must call each of its {len(passes)} passes")
    return torch.where(inputs.valid[:, None], output, 0.0), tuple(routings)
