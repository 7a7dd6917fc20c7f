"""Similarity-aware routing: tokens are routed like the tokens they resemble."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import attended, best_weighed, by_position
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 48,
    "title": "Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
    "tags": [
        "normalized",
        "lowest_index",
        "keeps_weights",
        "reads:causal",
        "reads:history",
        "reads:positions",
        "reads:sequence_ids",
    ],
    "gaps": {
        "check_logits_give_scores": "a score is the mean of several tokens' scores, a logit the token's own",
    },
}


@final
class SimilarityAware(Router):
    """Route a token by the mean of the router's scores of the tokens that resemble it.

    Every token is scored by a softmax over the experts. A token's score is then the mean of the scores
    of its sequence's tokens, weighted by a softmax of their similarity to it over ``temperature``: a dot
    product over the root of D, or a cosine. In a decoder (``causal``) only tokens up to itself count.
    The ``top_k`` experts of highest mean score are chosen, of equal ones that of lowest index, and
    weighted by these scores over their sum. Tokens and scores are carried along as history.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``. Comparing takes
        ``T * C`` products of D numbers for sequences of C tokens.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or ``temperature`` not in [1e-4, 1e4].
        UserError: positions are not given.

    Example:
        >>> router = SimilarityAware(LayerShape(d_model=4, d_expert=8, num_experts=3), temperature=1e-4)
        >>> tokens = RouterInput.of(torch.eye(4), positions=torch.arange(4))
        >>> torch.allclose(router(tokens).scores, router(tokens).logits.softmax(-1))
        True

    Differences from the paper:
        Written from the abstract and a summary. The similarity there may have parameters of its own;
        here it has none. Limiting it to earlier tokens in a decoder is ours.

    Cost:
        Each token is compared with the C tokens of its sequence, C products of D numbers beside top-k's
        E, and all tokens are copied into a table by position, which later calls go on from.

    Reference:
        Improving Routing in Sparse Mixture of Experts with Graph of Tokens (paper 48, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        similarity: Literal["dot", "cosine"] = "dot",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.similarity = similarity
        self.temperature = self.within("temperature", temperature, 1e-4, 1e4)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        alike, table = self._alike(inputs)
        scores, history = attended(softmax(logits), replace(inputs, attention=alike), "SimilarityAware")
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(
            inputs, chosen, weights, scores=scores, logits=logits, history=history | {"tokens": table}
        )

    @full_precision()
    def _alike(self, inputs: RouterInput) -> tuple[Float[Tensor, "T C"], Float[Tensor, "S C D1"]]:
        """How much each token counts the tokens of its sequence, by position; the tokens known so far."""
        x, positions = exact(inputs.x), inputs.need("positions", "SimilarityAware")
        cosine = self.similarity == "cosine"
        x = F.normalize(x, dim=-1) if cosine else x
        unit = self.temperature if cosine else self.temperature * x.shape[1] ** 0.5
        # A last column of ones tells the places of tokens from empty ones.
        table = by_position(F.pad(x, (0, 1), value=1.0), inputs, "SimilarityAware", "tokens")
        alike = x.new_zeros(x.shape[0], table.shape[1])
        for sequence in range(table.shape[0]):
            rows = ((inputs.sequences == sequence) & inputs.valid).nonzero().squeeze(-1)
            empty = table[sequence, :, -1] == 0
            if inputs.causal:
                empty = empty | (torch.arange(table.shape[1], device=x.device) > positions[rows, None])
            products = x[rows] @ table[sequence, :, :-1].T / unit
            alike = alike.index_copy(0, rows, products.masked_fill(empty, -torch.inf).softmax(-1))
        return alike, table
