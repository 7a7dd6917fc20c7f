"""Pieces of networks that estimators share: perceptrons, experts of any class run by a routing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods import create
from mixtura.types import LayerShape, RouterInput, Routing


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What a network made of T rows: its output, who was chosen, and what every expert said by itself."""

    output: Float[Tensor, "T O"]
    routing: Routing
    outputs: Float[Tensor, "E T W"] | None = None
    more: Any = None


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between."""
    layers: list[nn.Module] = []
    for place, (wide, narrow) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] if place else []
        layers.append(nn.Linear(wide, narrow))
    return nn.Sequential(*layers)


@final
class SwiGlu(nn.Module):
    """A gated feed-forward network without biases."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d_model, d_hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """The rows after it."""
        made: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return made


def router(name: str, d_model: int, num_experts: int, seed: int, **settings: Any) -> Any:
    """A router of the catalogue for rows of a width."""
    shape = LayerShape(d_model=d_model, d_expert=1, num_experts=num_experts)
    return create("routers", name, shape, seed=seed, **settings)


def routed(
    experts: Sequence[nn.Module] | nn.ModuleList, x: Float[Tensor, "T D"], routing: Routing, width: int
) -> Float[Tensor, "T O"]:
    """The weighted sum of what each row's experts make of it; experts run their own rows alone."""
    output = x.new_zeros(x.shape[0], width)
    ends = routing.offsets.tolist()
    for expert, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > begin:
            rows = routing.token_ids[begin:end]
            output = output.index_add(0, rows, experts[expert](x[rows]) * routing.weights[begin:end, None])
    return output


def everyone(experts: Iterable[nn.Module], x: Float[Tensor, "T D"]) -> Float[Tensor, "E T O"]:
    """What every expert makes of every row."""
    return torch.stack([expert(x) for expert in experts])


def dense_routing(
    weights: Float[Tensor, "T E"],
    logits: Float[Tensor, "T E"] | None = None,
    present: Tensor | None = None,
) -> Routing:
    """The routing in which every expert has every row, with these weights; or those that are present."""
    num_rows, num_experts = weights.shape
    ids = torch.arange(num_experts).expand(num_rows, num_experts)
    if present is not None:
        ids = torch.where(present, ids, num_experts)
    shown = weights.detach() if logits is None else logits
    valid = torch.ones(num_rows, dtype=torch.bool)
    return Routing.from_choices(ids, weights, scores=weights, logits=shown, valid=valid)


def told(x: Float[Tensor, "T D"], training: bool, **more: Any) -> RouterInput:
    """What a router is told of rows: they are no text, so later ones may be looked at."""
    return RouterInput.of(x, training=training, causal=False, **more)
