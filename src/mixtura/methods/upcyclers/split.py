"""The feed-forward part cut into as many narrow experts as there are to be."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from mixtura.errors import UnknownNameError, check_range
from mixtura.methods._drawing import generator_of
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import parts_of
from mixtura.types import Action
from mixtura.types.upcycling import (
    Build,
    Carry,
    DenseShape,
    DenseTrace,
    Recipe,
    SetRouter,
    UpcycleShape,
    array_name,
)

METHOD = {"paper": None, "title": "Split: each neuron in one expert"}


@final
class Split(Upcycler):
    """Deal the neurons of the feed-forward part out to E narrow experts, each neuron to one of them.

    No parameter is added but the router's, and a token reads K of E parts. With all parts on and a router of
    zeros (``router_std=0``) the model computes what the dense one does; with fewer on it computes a part of
    that, which training must make up for, and needs fewer operations from the start. What experts put out is
    added up, as in the dense model (their weights, about 1 / K, are undone by a factor in the down
    projection), or with ``rescaled`` enlarged by E / K besides, to the size it has with all parts on.
    ``order`` cuts the neurons as they lie, or shuffled.

    Shapes:
        A source of L layers to E experts of width F / E in each.

    Raises:
        SettingError: ``router_std`` is not in [0, 10].
        UnknownNameError: there is no such ``order``.
        UnmetError: E does not divide F.

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> recipe = Split(order="as_is").recipe((dense,), UpcycleShape(num_experts=2, top_k=2), None)
        >>> [(action.neurons, action.scale) for action in recipe.actions[1:3]]
        [((0, 4), 2.0), ((4, 8), 2.0)]
    """

    def __init__(
        self,
        *,
        order: Literal["as_is", "shuffled"] = "shuffled",
        rescaled: bool = False,
        router_std: float = 0.001,
    ) -> None:
        if order not in ("as_is", "shuffled"):
            raise UnknownNameError("order of Split", order, ("as_is", "shuffled"))
        check_range("Split", "router_std", router_std, 0, 10)
        self.order, self.rescaled, self.router_std = order, rescaled, router_std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        number, width = shape.num_experts, sources[0].d_ffn
        part = parts_of(width, number, "the feed-forward part")
        scale = float(number if self.rescaled else shape.top_k)
        actions: list[Action] = [Carry((0,), (1.0,))]
        arrays: list[Tensor] = []
        generator = generator_of(shape.seed)
        for layer in range(sources[0].num_layers):
            places = torch.randperm(width, generator=generator).view(number, part)
            for expert in range(number):
                neurons: tuple[int, int] | str = (expert * part, (expert + 1) * part)
                if self.order == "shuffled":
                    arrays.append(places[expert].sort().values.int())
                    neurons = array_name(arrays[-1])
                actions.append(Build(layer, expert, 0, neurons, scale))
            actions.append(SetRouter(layer, "normal", self.router_std, shape.seed))
        return Recipe.of(actions, arrays)
