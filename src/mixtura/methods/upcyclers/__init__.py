"""Making experts and routers of dense models."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mixtura.types.upcycling import DenseShape, DenseTrace, Recipe, UpcycleShape

# The attention of a model of mixtura's own whose experts are whole attentions.
ATTENTION_EXPERTS = "attention_experts"

KIND = {
    "base": "Upcycler",
    "summary": "Makes the experts and routers of an MoE model of dense models.",
    "tags": {
        "composes": "it takes several dense models that were made from the same one (`mixtura compose`); "
        "without it, one (`mixtura upcycle`)",
        "grows": "it adds layers to a dense model, which stays a dense one of its family",
        "initial:dense": "what comes out computes what the dense model does, to rounding; of several, where "
        "they are all alike",
        "of:moe": "it takes one MoE model, keeps its experts and gives its layers another router",
        "own": "what comes out is a model of mixtura's own, which plain transformers does not load",
        "reads:FIELD": "what it is told of text: `words` are mean embeddings of prompts for each source, "
        "`prompts` mean inputs of theirs in the first source, `own` those in each source's own feed-forward "
        "parts, `products` their products, `activations` those of neurons on any text, `largest` each "
        "token's neurons of largest activation, `domains` mean activations of neurons by domain of the text",
    },
}


class Upcycler(ABC):
    """Says of what each expert is made, what every token visits besides, and how routers begin.

    A method sees sizes and what a pass of text saw, no weights; the core does what its actions say, from
    disk to disk, and finds a family that holds the result. Weights of a token's experts sum to one in all of
    them, so that an expert that is to count in full beside K - 1 others is built with ``scale=K``.
    """

    @abstractmethod
    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        """Actions for every layer: E experts, a router, what else every token visits; and one `Carry`.

        ``trace`` is None where no tag asks for one.

        Raises:
            UserError: the sizes do not go with the method, or text is missing.
        """
