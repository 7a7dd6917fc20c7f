"""What an upcycler's actions come to in numbers: a layer of them beside the dense one, in plain sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.types.upcycling import Approach, Build, Recipe, SetRouter


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
    logits = x @ router_rows(recipe, layer, x.shape[1], len(experts)).T
    weights, chosen = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    outputs = torch.stack([dense.part(action, recipe.arrays)(x) for action in experts], 1)
    total = (outputs.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)
    for action in recipe.actions:
        if isinstance(action, Build) and action.layer == layer and action.expert is None:
            total = total + dense.part(action, recipe.arrays)(x)
    return total


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
