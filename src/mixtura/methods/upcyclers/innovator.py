"""Innovator: the general model's feed-forward part for every token, disciplines' cut into fine experts."""

from __future__ import annotations

from typing import final

from mixtura.errors import UnmetError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import carried, parts_of
from mixtura.types import Action
from mixtura.types.upcycling import Build, DenseShape, DenseTrace, Recipe, SetRouter, UpcycleShape

METHOD = {
    "paper": 207,
    "title": "Innovator: Scientific Continued Pretraining with Fine-grained MoE Upcycling",
    "tags": ["composes"],
}


@final
class Innovator(Upcycler):
    """Keep the first model's feed-forward part for every token, and cut those of the others into experts.

    The first model is the general one; each of the others, made from it by training on a discipline, is cut
    into E / (number of these) narrow experts. Every token visits the general part and is routed to K narrow
    ones besides, weighted and multiplied by ``scale``: at 0 the model begins as the general one, and at 1
    with narrow experts' outputs added to it.

    Shapes:
        1 + M sources of L layers to E experts of width F M / E in each, and a shared one of width F.

    Raises:
        SettingError: ``scale`` is not in [0, 1e3] or ``router_std`` not in [0, 10].
        UnmetError: E is no multiple of M, or E / M does not divide F.

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> recipe = Innovator().recipe((dense,) * 3, UpcycleShape(num_experts=4, top_k=2), None)
        >>> [(action.expert, action.source, action.neurons) for action in recipe.actions[1:4]]
        [(None, 0, None), (0, 1, (0, 4)), (1, 1, (4, 8))]

    Differences from the paper:
        Only the second of its four stages, the cut, is a change of weights. Training the disciplines'
        models comes before, and warming up the router and training all together after; what the shared
        part and attention do meanwhile is up to that training. There E is 64 and K is 8. The factor of
        routed experts and the router's start are not in the abstract.

    Reference:
        Innovator: Scientific Continued Pretraining with Fine-grained MoE Upcycling (paper 207, abstract).
    """

    def __init__(self, *, scale: float = 1.0, router_std: float = 0.02) -> None:
        check_range("Innovator", "scale", scale, 0, 1e3)
        check_range("Innovator", "router_std", router_std, 0, 10)
        self.scale, self.router_std = scale, router_std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        dense, number = sources[0], len(sources) - 1
        if shape.num_experts % number:
            raise UnmetError(
                f"{number} models besides the first cannot share {shape.num_experts} experts equally; give "
                f"--experts {number * max(1, round(shape.num_experts / number))}"
            )
        parts = shape.num_experts // number
        part = parts_of(dense.d_ffn, parts, "the feed-forward part")
        actions: list[Action] = [carried("first", len(sources))]
        for layer in range(dense.num_layers):
            actions.append(Build(layer, None, 0))
            for expert in range(shape.num_experts):
                start = expert % parts * part
                source = 1 + expert // parts
                actions.append(Build(layer, expert, source, (start, start + part), self.scale))
            actions.append(SetRouter(layer, "normal", self.router_std, shape.seed))
        return Recipe.of(actions)
