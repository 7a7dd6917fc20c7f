"""Router Upcycling: copies of the dense part behind several routers that begin as attention heads."""

from __future__ import annotations

from typing import Any, final

import torch

from mixtura.errors import SettingError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import drawn_rows
from mixtura.types import Action
from mixtura.types.upcycling import (
    Build,
    Carry,
    DenseShape,
    DenseTrace,
    Fill,
    Recipe,
    UpcycleShape,
    array_name,
)

METHOD = {
    "paper": 111,
    "title": "Router Upcycling: Leveraging Mixture-of-Routers in Mixture-of-Experts Upcycling",
    "tags": ["own", "initial:dense"],
}


@final
class RouterUpcycling(Upcycler):
    """Copy the feed-forward part into every expert, and make the routers of the attention before it.

    A router drawn at random tells copies apart by chance. Here ``num_routers`` routers begin as the first
    heads of the layer's attention: a router's query projection is the head's, and its key of an expert is the
    head's key projection of a row of features of that expert. Their votes, softmaxes as in attention, are
    averaged. As all experts are alike the model is the dense one at the start. With ``redrawn`` above 0 this
    share of each copy's neurons is drawn anew (drop-upcycling).

    Shapes:
        A source of L layers, of H heads of width W, to E experts of its width in each, and
        ``min(num_routers, H)`` routers of width W.

    Raises:
        SettingError: ``num_routers`` is not in [1, 1e4], ``redrawn`` not in [0, 1], or the heads of queries
            are no multiple of those of keys.

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1, num_heads=2, d_head=2)
        >>> recipe = RouterUpcycling().recipe((dense,), UpcycleShape(num_experts=4, top_k=2), None)
        >>> [(action.name, action.heads) for action in recipe.actions[-2:]]
        [('query', 2), ('key', 2)]

    Differences from the paper:
        What an expert's features are is not in the abstract: here rows from a standard normal distribution,
        as long as the normed states that a router is given, other ones in each layer. Which heads are taken,
        and how many (4), is ours. Biases, norms and rotations of queries and keys are left out. Only the
        abstract and its summary were at hand; there copies are trained on.

    Reference:
        Router Upcycling: Leveraging Mixture-of-Routers in Mixture-of-Experts Upcycling (paper 111, abstract).
    """

    def __init__(self, *, num_routers: int = 4, redrawn: float = 0.0) -> None:
        check_range("RouterUpcycling", "num_routers", num_routers, 1, 1e4)
        check_range("RouterUpcycling", "redrawn", redrawn, 0, 1)
        self.num_routers, self.redrawn = num_routers, redrawn

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        del trace
        dense = sources[0]
        if dense.num_heads % dense.num_key_value_heads:
            raise SettingError(
                f"{dense.num_heads} heads of queries are no multiple of {dense.num_key_value_heads} of keys"
            )
        heads, width = min(self.num_routers, dense.num_heads), dense.d_head
        # Each head of keys serves a run of heads of queries.
        owners = torch.arange(heads) // (dense.num_heads // dense.num_key_value_heads)
        keys = (owners[:, None] * width + torch.arange(width)).flatten().int()
        actions: list[Action] = [Carry((0,), (1.0,))]
        arrays = [keys]
        for layer in range(dense.num_layers):
            actions += [
                Build(layer, expert, 0, redrawn=self.redrawn, seed=shape.seed)
                for expert in range(shape.num_experts)
            ]
            arrays.append(drawn_rows(shape.num_experts, dense.d_model, 1.0, shape.seed, layer))
            cut: dict[str, Any] = {"heads": heads, "width": width}
            actions.append(Fill(layer, "query", matrix="query", **cut))
            times = array_name(arrays[-1])
            actions.append(Fill(layer, "key", matrix="key", rows=array_name(keys), times=times, **cut))
        router = {"name": "router_upcycling", "top_k": shape.top_k, "num_routers": heads, "width": width}
        return Recipe.of(actions, arrays, {"moe": {"router": router}})
