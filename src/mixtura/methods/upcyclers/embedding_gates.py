"""One expert of each model, with router rows from the embeddings of words for it."""

from __future__ import annotations

from typing import final, get_args

from mixtura.errors import UnknownNameError, UserError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import Rest, carried, needed, one_each, unit_rows, with_rows
from mixtura.types.upcycling import DenseShape, DenseTrace, Recipe, UpcycleShape

METHOD = {
    "paper": None,
    "title": "mergekit-moe, gates cheap_embed",
    "tags": ["composes", "initial:dense", "reads:words"],
}


@final
class EmbeddingGates(Upcycler):
    """Make an expert of each model's feed-forward part, its router row the mean embedding of prompts for it.

    The same row serves all layers. Nothing has to run for it but a look-up of words, and it is right in the
    first layers at best: `prompt_gates` costs one pass of the prompts and knows what routers are given.

    Shapes:
        E sources of L layers to E experts of their width in each.

    Raises:
        SettingError: ``length`` is not in [1e-3, 1e3].
        UnknownNameError: there is no such ``rest``.
        UserError: a source has no prompts, or there are not as many sources as experts.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=2)
        >>> trace = sample_dense_trace(dense, seed=0, num_groups=2)
        >>> recipe = EmbeddingGates().recipe((dense, dense), UpcycleShape(num_experts=2, top_k=1), trace)
        >>> recipe.actions[-1].rows == recipe.actions[-2].rows
        True

    Differences from mergekit:
        Prompts that an expert is not for are subtracted by mean, not by sum, before the row gets its length.
    """

    def __init__(self, *, rest: Rest = "first", length: float = 1.0) -> None:
        if rest not in get_args(Rest):
            raise UnknownNameError("rest of EmbeddingGates", rest, get_args(Rest))
        check_range("EmbeddingGates", "length", length, 1e-3, 1e3)
        self.rest, self.length = rest, length

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        seen = needed(trace, "EmbeddingGates")
        if seen.embeddings is None:
            raise UserError("this trace has no embeddings of prompts; trace again asking for them")
        rows = self.length * unit_rows(seen.rows(seen.embeddings, shape.num_experts))
        actions = [carried(self.rest, len(sources)), *one_each(sources, shape.num_experts)]
        return with_rows(actions, sources[0].num_layers, lambda _: rows)
