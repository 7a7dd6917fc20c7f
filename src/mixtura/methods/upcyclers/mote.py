"""MoTE: the dense model's feed-forward part as it is, and beside it many experts of three levels."""

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
    "paper": 27,
    "title": "MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models",
    "tags": ["own"],
}


@final
class Mote(Upcycler):
    """Freeze the feed-forward part as an expert for every token, and route to ternary copies of it besides.

    Routed experts (`ternary`) hold -s, 0 and s in each matrix, rounded anew in every pass from full weights
    that training moves as if nothing were rounded; a trained one needs 2 bits a weight, so that many ternary
    experts take the memory of few full ones. They begin as copies of the part, which stays in full precision
    and gets no gradient. What a copy puts out is multiplied by ``scale``: at 0 the model begins as the dense
    one, at 1, as published, with a rounded part on top of the whole one, which costs loss at the start.

    On a small model, trained on for a short while, it ended 0.03 nats a token above the dense model trained
    on, which two seeds do not separate from it (docs/arena/upcyclers.md).

    Shapes:
        A source of L layers to E ternary experts of its width in each, and a frozen one beside them.

    Raises:
        SettingError: ``scale`` is not in [0, 1e3], ``router_std`` not in [0, 10], or ``balance`` not in [0,
        1].

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> recipe = Mote().recipe((dense,), UpcycleShape(num_experts=2, top_k=1), None)
        >>> recipe.own["moe"]["experts"], recipe.own["moe"]["shared_frozen"]
        ('ternary', True)

    Differences from the paper:
        Only the abstract and a summary were at hand. There a token has one routed expert, which is
        ``--top-k 1`` here. There all but the experts and routers is frozen in training; here the feed-forward
        part always is, and the rest is up to the training. The coefficient of the loss that evens out
        experts, 0.01, is ours, and so is ``scale``. It is for models that see and read there.

    Reference:
        MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models (paper 27, abstract and
        a summary).
    """

    def __init__(self, *, scale: float = 1.0, router_std: float = 0.02, balance: float = 0.01) -> None:
        check_range("Mote", "scale", scale, 0, 1e3)
        check_range("Mote", "router_std", router_std, 0, 10)
        check_range("Mote", "balance", balance, 0, 1)
        self.scale, self.router_std, self.balance = scale, router_std, balance

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        del trace
        actions: list[Action] = [Carry((0,), (1.0,))]
        for layer in range(sources[0].num_layers):
            actions.append(Build(layer, None, 0))
            actions += [Build(layer, expert, 0, scale=self.scale) for expert in range(shape.num_experts)]
            actions.append(SetRouter(layer, "normal", self.router_std, shape.seed))
        # A weight of its own for one expert, too: divided by their sum it would have no gradient.
        router = {"name": "top_k", "top_k": shape.top_k, "renormalize": shape.top_k > 1}
        moe = {"router": router, "experts": "ternary", "shared_frozen": True}
        if self.balance:
            moe["balancers"] = [{"name": "switch_loss", "coefficient": self.balance}]
        return Recipe.of(actions, own={"moe": moe})
