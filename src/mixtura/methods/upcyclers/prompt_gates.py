"""One expert of each model, with router rows from what prompts for it look like to a router."""

from __future__ import annotations

from typing import Literal, final, get_args

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UnknownNameError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import Rest, carried, needed, one_each, unit_rows, with_rows
from mixtura.types.upcycling import DenseShape, DenseTrace, Recipe, UpcycleShape

METHOD = {
    "paper": None,
    "title": "mergekit-moe, gates hidden, of true router inputs",
    "tags": ["composes", "initial:dense", "reads:prompts"],
}


@final
class PromptGates(Upcycler):
    """Make an expert of each model's feed-forward part, its router row the mean input of prompts for it.

    Prompts run through the first model. What a router is given in a layer is what the feed-forward part is
    given, a normed state: its mean over the tokens of each prompt and then over prompts (``pool="last"``: at
    each prompt's last token) is the row, less that of prompts it is not for, made of length ``length``.

    Shapes:
        E sources of L layers to E experts of their width in each.

    Raises:
        SettingError: ``length`` is not in [1e-3, 1e3].
        UnknownNameError: there is no such ``pool`` or ``rest``.
        UserError: a source has no prompts, or there are not as many sources as experts.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> trace = sample_dense_trace(dense, seed=0, num_groups=2)
        >>> recipe = PromptGates().recipe((dense, dense), UpcycleShape(num_experts=2, top_k=1), trace)
        >>> [round(row.norm().item(), 3) for row in recipe.arrays[recipe.actions[-1].rows]]
        [1.0, 1.0]

    Differences from mergekit:
        mergekit takes residual states as they enter a layer, not the normed ones that its router will be
        given, counts padding (its ``hidden`` is the last column, its ``hidden_avg`` the mean over all), and
        holds the whole model in memory.
    """

    def __init__(
        self, *, pool: Literal["mean", "last"] = "mean", rest: Rest = "first", length: float = 1.0
    ) -> None:
        if pool not in ("mean", "last"):
            raise UnknownNameError("pool of PromptGates", pool, ("mean", "last"))
        if rest not in get_args(Rest):
            raise UnknownNameError("rest of PromptGates", rest, get_args(Rest))
        check_range("PromptGates", "length", length, 1e-3, 1e3)
        self.pool, self.rest, self.length = pool, rest, length

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        seen = needed(trace, "PromptGates")

        def rows(layer: int) -> Float[Tensor, "E D"]:
            values = seen.layers[layer].means if self.pool == "mean" else seen.layers[layer].lasts
            return self.length * unit_rows(seen.rows(values, shape.num_experts))

        actions = [carried(self.rest, len(sources)), *one_each(sources, shape.num_experts)]
        return with_rows(actions, sources[0].num_layers, rows)
