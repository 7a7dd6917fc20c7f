"""Dynamic-DINO: narrow experts in copied groups, whose router takes a whole group at first."""

from __future__ import annotations

from typing import final

from mixtura.errors import UnmetError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import drawn_rows, parts_of, with_rows
from mixtura.types import Action
from mixtura.types.upcycling import Build, Carry, DenseShape, DenseTrace, Recipe, UpcycleShape

METHOD = {
    "paper": 21,
    "title": "Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object "
    "Detection",
    "tags": ["initial:dense"],
}


@final
class DynamicDino(Upcycler):
    """Cut the feed-forward part into K parts, copy that group E / K times, and begin by taking one group.

    A token takes as many experts as there are parts. The router has one row for a group, repeated for its
    parts, so that parts of the best group come first, all of them: the model computes what the dense one
    does, at its cost, and training is free to mix parts of any group. Parts are weighted alike, 1 / K, which
    a factor K in the down projection undoes. The same is known as virtual groups of fine-grained upcycling.

    Shapes:
        A source of L layers to E experts of width F / K in each.

    Raises:
        SettingError: ``router_std`` is not in [0, 10].
        UnmetError: K does not divide E or F.

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> recipe = DynamicDino().recipe((dense,), UpcycleShape(num_experts=4, top_k=2), None)
        >>> [(action.neurons, action.scale) for action in recipe.actions[1:5]]
        [((0, 4), 2.0), ((4, 8), 2.0), ((0, 4), 2.0), ((4, 8), 2.0)]

    Differences from the paper:
        There the feed-forward part of a detector's decoder is cut; here that of language models. Router
        rows are drawn from a normal distribution, one a group; the abstract does not say from which. A router
        that computes in bfloat16 may find two groups alike to the bit, and takes parts of both then, for
        about one token in a hundred; in float32 that does not happen.

    Reference:
        Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object Detection
        (paper 21, abstract).
    """

    def __init__(self, *, router_std: float = 0.02) -> None:
        check_range("DynamicDino", "router_std", router_std, 0, 10)
        self.router_std = router_std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        dense, parts = sources[0], shape.top_k
        part = parts_of(dense.d_ffn, parts, "the feed-forward part")
        if shape.num_experts % parts:
            raise UnmetError(
                f"the experts are copies of a group of --top-k {parts} parts, and {shape.num_experts} is no "
                f"multiple of that; give --experts {parts * max(2, shape.num_experts // parts)}"
            )
        actions: list[Action] = [Carry((0,), (1.0,))]
        for layer in range(dense.num_layers):
            for expert in range(shape.num_experts):
                start = expert % parts * part
                actions.append(Build(layer, expert, 0, (start, start + part), float(parts)))
        groups = shape.num_experts // parts
        return with_rows(
            actions,
            dense.num_layers,
            lambda layer: drawn_rows(
                groups, dense.d_model, self.router_std, shape.seed, layer
            ).repeat_interleave(parts, 0),
        )
