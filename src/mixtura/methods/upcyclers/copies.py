"""Sparse upcycling: every expert a copy of the feed-forward part, some of its neurons drawn anew."""

from __future__ import annotations

from typing import final

from mixtura.errors import check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.types import Action
from mixtura.types.upcycling import (
    Build,
    Carry,
    DenseShape,
    DenseTrace,
    Recipe,
    SetRouter,
    UpcycleShape,
)

METHOD = {
    "paper": None,
    "title": "Copies: sparse upcycling and drop-upcycling",
    "tags": ["initial:dense"],
}


@final
class Copies(Upcycler):
    """Make every expert a copy of the feed-forward part, with a router that is drawn at random.

    As all experts are alike and their weights sum to one, the model computes what the dense one does,
    whatever its router does, until training drives experts apart. With ``redrawn`` (drop-upcycling) a share
    of each expert's neurons, others in each, begins with new weights, from a normal distribution of the mean
    and deviation of those that they replace: experts are different from the start, which costs some loss at
    the start and pays when training is long.

    Shapes:
        A source of L layers to E experts of its width F in each.

    Raises:
        SettingError: ``redrawn`` is not in [0, 1] or ``router_std`` not in [0, 10].

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> recipe = Copies().recipe((dense,), UpcycleShape(num_experts=2, top_k=1), None)
        >>> [action.kind for action in recipe.actions]
        ['carry', 'build', 'build', 'set_router']
    """

    def __init__(self, *, redrawn: float = 0.0, router_std: float = 0.02) -> None:
        check_range("Copies", "redrawn", redrawn, 0, 1)
        check_range("Copies", "router_std", router_std, 0, 10)
        self.redrawn, self.router_std = redrawn, router_std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        actions: list[Action] = [Carry((0,), (1.0,))]
        for layer in range(sources[0].num_layers):
            actions += [
                Build(layer, expert, 0, redrawn=self.redrawn, seed=shape.seed)
                for expert in range(shape.num_experts)
            ]
            actions.append(SetRouter(layer, "normal", self.router_std, shape.seed))
        return Recipe.of(actions)
