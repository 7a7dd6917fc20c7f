"""Yuan 2.0's attention router: experts attend to each other before they are compared."""

from __future__ import annotations

from typing import final

from torch.nn import functional as F

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits, full_precision
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 107,
    "title": "Yuan 2.0-M32: Mixture of Experts with Attention Router",
    "tags": ["normalized", "token_independent", "lowest_index"],
}


@final
class YuanAttention(Router):
    """Let the experts' scores of a token attend to each other, then take the ``top_k`` best.

    A token gives every expert three numbers: a query, a key and a value. An expert's logit is the mean of
    all experts' values, weighted by a softmax over its query times their keys; so experts are not judged
    one by one but with regard to how they go together. Weights are the softmax probabilities of the
    chosen experts over their sum; of equal logits the lowest index wins.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments, by a table ``[T, E, E]``; one parameter,
        ``weight [3 * E, D]``: rows of queries, keys and values.

    Raises:
        SettingError: ``top_k`` is not in [1, E].

    Example:
        >>> import torch
        >>> router = YuanAttention(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> router(RouterInput.of(torch.zeros(2, 4))).expert_ids.tolist()
        [0, 0, 1, 1]

    Differences from the paper:
        None known in the forward pass of the published model. The training code there lets tokens of a
        stretch of the sequence share one attention between experts, over heads; the inference code, which
        is followed here, treats each token alone.

    Cost:
        Three rows an expert in place of one, and ``E * E`` powers a token for the attention between
        experts.

    Reference:
        Yuan 2.0-M32: Mixture of Experts with Attention Router (paper 107, abstract);
        ``ParallelAttention_router`` in IEIT-Yuan/Yuan2.0-M32.
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.seed = seed
        self.weight = drawn(seed, 3 * shape.num_experts, shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        query, key, value = exact_logits(inputs.x, self.weight).chunk(3, dim=-1)
        # One head of width 1 for each token, over its experts.
        query, key, value = (part[:, None, :, None] for part in (query, key, value))
        with full_precision():
            logits = F.scaled_dot_product_attention(query, key, value, scale=1.0).flatten(1)
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
