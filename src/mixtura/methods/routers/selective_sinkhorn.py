"""Selective Sinkhorn routing: on a few steps tokens are transported to experts, else plain top-k."""

from __future__ import annotations

import math
from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed, sinkhorn
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 76,
    "title": "Selective Sinkhorn Routing for Improved Sparse Mixture of Experts",
    "tags": [
        "normalized",
        "looks_ahead",
        "causal_inference",
        "batch_dependent",
        "keeps_weights",
        "reads:training",
        "reads:step",
    ],
}


@final
class SelectiveSinkhorn(Router):
    """Balance experts without a loss: on a share of the training steps, scores are a transport plan.

    On those steps an entropic transport problem is solved whose plan gives each valid token the mass 1
    and each expert an equal part of the tokens. The plan's rows are both what is compared and the
    weights of the ``top_k`` chosen experts (over their sum), and the gradient goes through Sinkhorn's
    iterations. On all other steps, and outside training, scores are a softmax over the logits. The
    ``rate`` is spread evenly: with 0.1, every tenth step is solved. Of equal scores the lowest index wins.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``rate`` not in [0, 1], ``num_iterations`` not in
            [1, 1000] or ``temperature`` not in [1e-3, 1e3].

    Example:
        >>> import torch
        >>> router = SelectiveSinkhorn(LayerShape(d_model=4, d_expert=8, num_experts=2), top_k=1, rate=0.5)
        >>> x = torch.ones(6, 4) + torch.arange(6.0)[:, None]
        >>> [router(RouterInput.of(x, training=True, step=step)).load.max().item() for step in range(4)]
        [6, 3, 6, 3]

    Differences from the paper:
        Which steps are solved is ours: evenly spread over training, the same ones in every layer, so
        that a recomputed forward pass is the same. The default ``rate`` stands for the paper's "minimal
        degree" of transport; only the abstract and its summary were at hand.

    Reference:
        Selective Sinkhorn Routing for Improved Sparse Mixture of Experts (paper 76, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        rate: float = 0.1,
        num_iterations: int = 10,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.rate = self.within("rate", rate, 0, 1)
        self.num_iterations = self.within("num_iterations", num_iterations, 1, 1000)
        self.temperature = self.within("temperature", temperature, 1e-3, 1e3)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def solves(self, step: int) -> bool:
        """Whether the transport problem is solved on this training step."""
        # Rounded, because 10 * 0.1 must count as a whole.
        return math.floor(round((step + 1) * self.rate, 9)) > math.floor(round(step * self.rate, 9))

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        if inputs.training and self.solves(inputs.step):
            scores = sinkhorn(
                logits, inputs.valid, num_iterations=self.num_iterations, temperature=self.temperature
            )
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
