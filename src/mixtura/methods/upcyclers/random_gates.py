"""One expert of each model, with a router that is drawn at random."""

from __future__ import annotations

from typing import final, get_args

from mixtura.errors import UnknownNameError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import Rest, carried, one_each
from mixtura.types.upcycling import DenseShape, DenseTrace, Recipe, SetRouter, UpcycleShape

METHOD = {
    "paper": None,
    "title": "mergekit-moe, gates random; Branch-Train-MiX",
    "tags": ["composes", "initial:dense"],
}


@final
class RandomGates(Upcycler):
    """Make an expert of each model's feed-forward part, with a router from a normal distribution.

    What stands outside the experts is the first model's, or with ``rest="average"`` the average of all, as
    Branch-Train-MiX begins. The router knows nothing and has to be trained; this is what other routers are
    to be better than.

    Shapes:
        E sources of L layers to E experts of their width in each.

    Raises:
        SettingError: ``std`` is not in [0, 10].
        UnknownNameError: there is no such ``rest``.
        UserError: there are not as many sources as experts.

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> recipe = RandomGates().recipe((dense, dense), UpcycleShape(num_experts=2, top_k=1), None)
        >>> [action.source for action in recipe.actions[1:3]]
        [0, 1]
    """

    def __init__(self, *, rest: Rest = "first", std: float = 0.02) -> None:
        if rest not in get_args(Rest):
            raise UnknownNameError("rest of RandomGates", rest, get_args(Rest))
        check_range("RandomGates", "std", std, 0, 10)
        self.rest, self.std = rest, std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        layers = range(sources[0].num_layers)
        routers = [SetRouter(layer, "normal", self.std, shape.seed) for layer in layers]
        experts = one_each(sources, shape.num_experts)
        return Recipe.of([carried(self.rest, len(sources)), *experts, *routers])
