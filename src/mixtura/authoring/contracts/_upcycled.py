"""What an upcycler's actions come to in numbers: a layer of them beside the dense one, in plain sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.authoring.contracts._core import require
from mixtura.methods import create
from mixtura.methods.routers import Router
from mixtura.types import LayerShape, RouterInput
from mixtura.types.upcycling import Approach, Build, Fill, Recipe, SetRouter


@final
@dataclass(frozen=True, slots=True)
class FeedForward:
    """A dense feed-forward part of float64."""

    gate: Float[Tensor, "F D"]
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "D F"]

    @staticmethod
    def drawn(d_model: int, width: int, seed: int) -> FeedForward:
        """One of random weights."""
        generator = torch.Generator().manual_seed(seed)
        gate, up, down = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((width, d_model), (width, d_model), (d_model, width))
        )
        return FeedForward(gate, up, down)

    def __call__(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """What it puts out."""
        return (torch.nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T

    def part(self, action: Build | Approach, arrays: Mapping[str, Tensor]) -> FeedForward:
        """The expert that an action makes of it, where it is every source, and no neuron is drawn anew."""
        if isinstance(action, Approach) or action.neurons is None:
            ids = torch.arange(self.gate.shape[0])
        elif isinstance(action.neurons, str):
            ids = arrays[action.neurons].long()
        else:
            ids = torch.arange(*action.neurons)
        scale = action.scale if isinstance(action, Build) else 1.0
        return FeedForward(self.gate[ids], self.up[ids], scale * self.down[:, ids])


def output_of_layer(
    recipe: Recipe, layer: int, dense: FeedForward, x: Float[Tensor, "T D"], top_k: int
) -> Float[Tensor, "T D"]:
    """What an MoE layer of the recipe puts out, all sources being one dense part."""
    experts = made(recipe, layer)
    outputs = torch.stack([dense.part(action, recipe.arrays)(x) for action in experts], 1)
    if recipe.own:
        router = filled_router(recipe, layer, dense, len(experts), dense.gate.shape[0])
        routing = router.double()(RouterInput.of(x))
        weights = torch.zeros(len(x), len(experts), dtype=x.dtype)
        weights[routing.token_ids, routing.expert_ids] = routing.weights.detach().to(x.dtype)
    else:
        logits = x @ router_rows(recipe, layer, x.shape[1], len(experts)).T
        best, chosen = logits.softmax(-1).topk(top_k)
        weights = torch.zeros_like(logits).scatter(1, chosen, best / best.sum(-1, keepdim=True))
    total = (outputs * weights[..., None]).sum(1)
    for action in recipe.actions:
        if isinstance(action, Build) and action.layer == layer and action.expert is None:
            total = total + dense.part(action, recipe.arrays)(x)
    return total


def filled_router(recipe: Recipe, layer: int, dense: FeedForward, num_experts: int, width: int) -> Router:
    """The router of a layer of mixtura's own, as actions fill it; queries and keys are made up."""
    choice = dict(recipe.own["moe"]["router"])
    shape = LayerShape(d_model=dense.gate.shape[1], d_expert=width, num_experts=num_experts)
    router: Router = create("routers", choice.pop("name"), shape, **choice)
    known = {"gate": dense.gate, "up": dense.up, "query": dense.gate, "key": dense.up}
    parameters = dict(router.named_parameters())
    for action in recipe.actions:
        if isinstance(action, Fill) and action.layer == layer:
            made_of = None if action.matrix is None else known[action.matrix].float()
            value = action.made(made_of, recipe.arrays)
            wanted = tuple(parameters[action.name].shape)
            require(tuple(value.shape) == wanted, f"{action.name} is {tuple(value.shape)}, not {wanted}")
            with torch.no_grad():
                parameters[action.name].copy_(value)
    return router.eval()


def made(recipe: Recipe, layer: int) -> Sequence[Build | Approach]:
    """The actions that make a layer's experts, by number."""
    found = (a for a in recipe.actions if isinstance(a, Build | Approach) and a.layer == layer)
    return sorted((a for a in found if a.expert is not None), key=lambda action: int(action.expert or 0))


def router_rows(recipe: Recipe, layer: int, d_model: int, num_experts: int) -> Float[Tensor, "E D"]:
    """The rows that a layer's router begins with."""
    (action,) = (a for a in recipe.actions if isinstance(a, SetRouter) and a.layer == layer)
    if action.init == "rows":
        return recipe.arrays[str(action.rows)].double()
    if action.init == "zeros":
        return torch.zeros(num_experts, d_model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(action.seed)
    drawn = torch.randn(num_experts, d_model, generator=generator, dtype=torch.float64)
    return action.std * drawn
