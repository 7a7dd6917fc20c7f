"""BASE layers: tokens and experts are matched so that all experts get equally many tokens."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._drawing import orthogonal
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._assignment import balanced
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 102,
    "title": "BASE Layers: Simplifying Training of Large, Sparse Models",
    "tags": ["expert_rows", "looks_ahead", "causal_inference", "batch_dependent", "reads:training"],
}


@final
class BaseLayer(Router):
    """Match the batch's tokens with experts for the greatest total affinity, all experts equally full.

    A token's affinity for an expert is its product with the expert's centroid. In training a linear
    assignment problem is solved over the valid tokens of the batch: every token gets one expert and no
    expert more than ``tokens / experts`` (rounded up), so nothing is dropped and no balancing loss is
    needed. Otherwise each token takes its best expert; of equal affinities the lowest index wins. The
    expert's output is weighted by the sigmoid of the affinity, through which centroids learn.

    Shapes:
        ``x [T, D]`` to T assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``tolerance`` is not in [1e-6, 1].

    Example:
        >>> router = BaseLayer(LayerShape(d_model=4, d_expert=8, num_experts=2))
        >>> same = torch.ones(6, 4)
        >>> router(RouterInput.of(same, training=True)).load.tolist()
        [3, 3]

    Differences from the paper:
        The assignment is found by an auction whose total affinity is within ``tolerance`` times the
        range of affinities, per token, of the best. Where E does not divide the tokens, the rest is
        spread over experts; the paper's code needs them to divide. An expert there has a residual
        connection inside, so that mixing its output with its input by the sigmoid is the input plus
        the weighted output, as here in a model with residual connections. Tokens are not shuffled over
        processes first; each process balances its own.

    Cost:
        In training the rounds of the auction follow one another, and there are many where tokens compete
        for an expert: several times top-k's time. Inference is as fast as top-k.

    Reference:
        BASE Layers: Simplifying Training of Large, Sparse Models (paper 102, abstract); ``BaseLayer`` in
        facebookresearch/fairseq.
    """

    def __init__(self, shape: LayerShape, *, tolerance: float = 1e-3, seed: int = 0) -> None:
        super().__init__(shape)
        self.tolerance = self.within("tolerance", tolerance, 1e-6, 1)
        self.seed = seed
        self.weight = orthogonal(shape.num_experts, shape.d_model, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        chosen = best(logits, 1)
        if inputs.training:
            rows = inputs.valid.nonzero().squeeze(-1)
            matched = balanced(logits[rows], tolerance=self.tolerance)
            chosen = chosen.index_copy(0, rows, matched[:, None])
        return self.chose(
            inputs, chosen, torch.sigmoid(logits).gather(-1, chosen), scores=softmax(logits), logits=logits
        )
