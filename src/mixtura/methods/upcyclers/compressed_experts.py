"""Compressed Experts: fewer experts of a trained MoE model run, and vectors stand for the others."""

from __future__ import annotations

from typing import final

from mixtura.errors import UnmetError
from mixtura.methods.upcyclers import Upcycler
from mixtura.types.upcycling import Carry, DenseShape, DenseTrace, Recipe, UpcycleShape

METHOD = {
    "paper": 18,
    "title": "Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
    "tags": ["of:moe", "own"],
}


@final
class CompressedExperts(Upcycler):
    """Let a trained MoE model run some of a token's experts, and learn a vector for each of the others.

    Of the K experts that a token is routed to, the best ``--top-k`` run as they are. The rest become one
    vector an expert, which multiplies what the main experts read (the router `compressed_experts`).
    Vectors begin at zero: at the start the model is the trained one with fewer experts, their weights as
    they were, and what was lost is learned back by tuning, at fewer active parameters.

    On a small model, trained on for a short while, vectors gained 0.003 nats a token on just leaving the
    experts out, which two seeds do not separate from nothing (docs/arena/upcyclers.md).

    Shapes:
        An MoE model of E experts of which a token takes K, to one of as many of which it takes
        ``--top-k``, at least 1 and fewer than K.

    Raises:
        UnmetError: the model has no more experts for a token than are to stay.

    Example:
        >>> source = DenseShape(d_model=4, d_ffn=8, num_layers=1, num_experts=8, top_k=4)
        >>> CompressedExperts().recipe((source,), UpcycleShape(num_experts=8, top_k=3), None).own
        {'moe': {'router': {'name': 'compressed_experts', 'top_k': 3, 'compressed': 1}}}

    Differences from the paper:
        Only the abstract was at hand; what a compressed expert is, is said at the router. The tuning that
        follows is `mixtura train` or `tune`; there models were tuned for a task, and kept over 90 % of it
        with 30 % fewer active parameters, which was not tried again here.

    Reference:
        Efficiently Editing Mixture-of-Experts Models with Compressed Experts (paper 18, abstract).
    """

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        del trace
        had = sources[0].top_k
        if shape.top_k >= had:
            raise UnmetError(
                f"a token has {had} experts in this model, and {shape.top_k} are to stay; give --top-k below "
                f"{had}"
                if had > 1
                else "a token has 1 expert in this model, so that none could be compressed"
            )
        router = {"name": "compressed_experts", "top_k": shape.top_k, "compressed": had - shape.top_k}
        return Recipe.of([Carry((0,), (1.0,))], own={"moe": {"router": router}})
