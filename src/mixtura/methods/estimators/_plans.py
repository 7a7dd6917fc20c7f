"""Plans as small graphs, blocks that features belong to, and predictors of several measures of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._networks import Passed, dense_routing, perceptron
from mixtura.methods.estimators._training import seeded


def measures_of(y: Any, num_rows: int, owner: str) -> Float[np.ndarray, "n K"]:
    """A column a measure, NaN where a plan was not measured.

    Raises:
        UserError: it is something else, or a measure was taken fewer than two times.
    """
    try:
        values = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"y of {owner} holds numbers, NaN where there is none; got others") from None
    if values.ndim != 2 or len(values) != num_rows or np.isinf(values).any():
        raise UserError(
            f"y of {owner} is {num_rows} rows with a column a measure, finite or NaN, got a shape of "
            f"{values.shape}"
        )
    for place, taken in enumerate((~np.isnan(values)).sum(0)):
        if taken < 2:
            raise UserError(f"measure {place} of {owner} was taken of {taken} plans; take it of 2 or more")
    return values


def joined(edges: Sequence[Sequence[int]] | None, num_nodes: int) -> Float[Tensor, "L L"]:
    """How each block averages over those joined to it, to and fro; without edges each to the next.

    Raises:
        SettingError: an edge is no pair of blocks.
    """
    pairs = list(pairwise(range(num_nodes))) if edges is None else [tuple(one) for one in edges]
    near = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    for pair in pairs:
        if len(pair) != 2 or not all(0 <= node < num_nodes for node in pair):
            raise SettingError(f"edges must be pairs of blocks from 0 to {num_nodes - 1}, got {list(pair)}")
        near[pair[0], pair[1]] = near[pair[1], pair[0]] = 1
    return near / near.sum(1, keepdim=True).clamp(min=1)


@final
class Adapter(nn.Module):
    """Layers of their own beside the base's: each reads what the base's layer made and the one before it."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(num_layers))
        self.head = perceptron(2 * width, width, 1)

    def forward(self, states: list[Tensor], near: Float[Tensor, "L L"]) -> Float[Tensor, "n 1"]:
        """The measure, from the base's states of blocks, the embedding first."""
        own = states[0]
        for layer, state in zip(self.layers, states[1:], strict=True):
            both = torch.cat([state, own], dim=-1)
            own = layer(torch.cat([both, near @ both], dim=-1)).tanh()
        made: Tensor = self.head(torch.cat([states[-1].mean(1), own.mean(1)], dim=-1))
        return made


@final
class PlanNetwork(nn.Module):
    """A graph network of blocks with a head, and an adapter for each further measure."""

    def __init__(self, num_nodes: int, d_node: int, num_measures: int, near: Tensor, owner: Any) -> None:
        super().__init__()
        width = owner.d_hidden
        self.num_nodes = num_nodes
        self.near: Tensor
        self.register_buffer("near", near, persistent=False)
        self.embed = nn.Linear(d_node, width)
        self.places = nn.Parameter(0.1 * torch.randn(num_nodes, width))
        self.layers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(owner.num_layers))
        self.head = perceptron(width, width, 1)
        # Drawn aside, so that the base is the same however many measures there are.
        with seeded(owner.random_state + 1):
            num = num_measures - 1
            self.adapters = nn.ModuleList(Adapter(width, owner.num_layers) for _ in range(num))

    def states(self, x: Float[Tensor, "n D"]) -> list[Tensor]:
        """What the base makes of blocks, layer by layer, the embedding first."""
        made = [self.embed(x.reshape(len(x), self.num_nodes, -1)) + self.places]
        for layer in self.layers:
            made.append(layer(torch.cat([made[-1], self.near @ made[-1]], dim=-1)).tanh())
        return made

    def base(self, states: list[Tensor]) -> Float[Tensor, "n 1"]:
        """The first measure."""
        made: Tensor = self.head(states[-1].mean(1))
        return made


@final
class MeasuredPlan(nn.Module):
    """A plan's network with a head for the first measure and an adapter for every other."""

    def __init__(self, plan: PlanNetwork) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        states = self.plan.states(x)
        said = [self.plan.base(states), *(adapter(states, self.plan.near) for adapter in self.plan.adapters)]
        output = torch.cat(said, dim=1)
        weights = torch.full_like(output, 1 / max(len(said) - 1, 1))
        if len(said) > 1:
            weights[:, 0] = 0
        routing = dense_routing(weights, output.detach())
        return Passed(output=output, routing=routing, outputs=torch.stack(said))


def missed(said: Float[Tensor, "T K"], wanted: Float[Tensor, "T K"]) -> Float[Tensor, ""]:
    """The mean squared error over what was measured."""
    known = ~wanted.isnan()
    return ((said - wanted.nan_to_num()).square() * known).sum() / known.sum().clamp(min=1)


def agreement(said: Float[np.ndarray, "n K"], values: Float[np.ndarray, "n K"], weights: Any) -> float:
    """The coefficient of determination, the mean over measures, of the rows that were measured."""
    from sklearn.metrics import r2_score

    weights = np.ones(len(said)) if weights is None else np.asarray(weights)
    each = [
        r2_score(values[known, place], said[known, place], sample_weight=weights[known])
        for place, known in enumerate(~np.isnan(values.T))
        if known.sum() > 1
    ]
    return float(np.mean(each)) if each else float("nan")
