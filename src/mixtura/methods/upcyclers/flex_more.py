"""FlexMoRE: experts that are the first model's feed-forward part and a change of low rank."""

from __future__ import annotations

from typing import final

from mixtura.errors import SettingError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import carried, needed, one_each, unit_rows, with_rows
from mixtura.types import Action
from mixtura.types.upcycling import Approach, Build, DenseShape, DenseTrace, Recipe, UpcycleShape

METHOD = {
    "paper": 215,
    "title": "FlexMoRE: A Flexible Mixture of Rank-heterogeneous Experts for Efficient Federatedly-trained "
    "Large Language Models",
    "tags": ["composes", "initial:dense", "reads:prompts"],
}


@final
class FlexMore(Upcycler):
    """Make the first model's feed-forward part an expert, and of each other the change to it, of low rank.

    The first model is the public one. What another differs by in each matrix is cut down to its first
    ``rank`` singular values (``ranks``: one for each of the others), which is the nearest matrix of that
    rank; 0 leaves the public expert, the full width the other model's own. Differences of a fine-tune are
    often of low rank: what is cut is noise as well as skill. Router rows are mean inputs of each model's
    prompts, of length ``length``.

    Shapes:
        E sources of L layers to E experts of their width in each.

    Raises:
        SettingError: ``rank`` is not in [0, 2**20], ``length`` not in [1e-3, 1e3], or ``ranks`` are not as
            many as the models after the first, or below 0.
        UserError: a source has no prompts, or there are not as many sources as experts.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> trace = sample_dense_trace(dense, seed=0, num_groups=2)
        >>> recipe = FlexMore(rank=2).recipe((dense, dense), UpcycleShape(num_experts=2, top_k=1), trace)
        >>> [action.kind for action in recipe.actions]
        ['carry', 'build', 'approach', 'set_router']

    Differences from the paper:
        The changes are added to the public matrices, so that ordinary families hold the model (flex_olmo
        where the models are OLMo 2), at full size; there they are kept as factors, in a fork of
        transformers. There experts are those of FlexOlmo, trained with a router row of their own; here rows
        come from prompts. Ranks from 1 to 16384 were tried there.

    Reference:
        FlexMoRE: A Flexible Mixture of Rank-heterogeneous Experts for Efficient Federatedly-trained Large
        Language Models (paper 215); repository schneiderkamplab/FlexMoRE, as notes on it describe it.
    """

    def __init__(self, *, rank: int = 64, ranks: list[int] | None = None, length: float = 1.0) -> None:
        check_range("FlexMore", "rank", rank, 0, 2**20)
        check_range("FlexMore", "length", length, 1e-3, 1e3)
        if ranks is not None and min(ranks, default=-1) < 0:
            raise SettingError(f"ranks of FlexMore must be 0 or more, one for each source, got {ranks}")
        self.rank, self.ranks, self.length = rank, ranks, length

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        seen = needed(trace, "FlexMore")
        ranks = [self.rank] * (len(sources) - 1) if self.ranks is None else self.ranks
        if len(ranks) != len(sources) - 1:
            raise SettingError(
                f"ranks of FlexMore must be one for each of {len(sources) - 1} models after the first, got "
                f"{len(ranks)}"
            )
        experts: list[Action] = []
        for action in one_each(sources, shape.num_experts):
            assert isinstance(action, Build)
            number = action.source
            experts.append(Approach(action.layer, number, number, 0, ranks[number - 1]) if number else action)
        return with_rows(
            [carried("first", len(sources)), *experts],
            sources[0].num_layers,
            lambda layer: self.length * unit_rows(seen.rows(seen.layers[layer].means, shape.num_experts)),
        )
