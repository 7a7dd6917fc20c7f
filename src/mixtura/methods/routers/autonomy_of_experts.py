"""Autonomy of experts: there is no router, experts rank themselves by their activations."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 110,
    "title": "Autonomy-of-Experts Models",
    "tags": ["normalized", "token_independent", "lowest_index", "reads:experts"],
}


@final
class AutonomyOfExperts(Router):
    """Send each token to the ``top_k`` experts whose first activations of it are largest.

    Every expert multiplies the token by its gate matrix (by its up matrix where it has no gate); the
    norms of what comes out rank the experts, and a softmax over the chosen norms weighs them. An expert
    thus knows by itself what it can handle, and there are no router parameters to train.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; no parameters; reads matrices of ``E * F * D`` numbers.

    Raises:
        SettingError: ``top_k`` is not in [1, E].
        UserError: the experts are not given.

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> inputs = RouterInput.of(torch.eye(4), experts=Experts(shape).matrices)
        >>> AutonomyOfExperts(shape, top_k=2)(inputs).load.sum().item()
        8

    Differences from the paper:
        There each first matrix is a product of two thin ones, and the norm is taken between them, which
        makes asking every expert cheap. Here experts are what the layer has, with full matrices, so the
        first product of every expert is computed, and that of the chosen ones once more in the layer.

    Cost:
        Every expert multiplies every token by its whole first matrix: F rows where top-k's router has
        one, and in training the way back through them. That is the method's own; the paper's thin factors
        would make F the rank.

    Reference:
        Autonomy-of-Experts Models (paper 110, abstract).
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)

    def forward(self, inputs: RouterInput) -> Routing:
        experts: ExpertsHandle = inputs.need("experts", "AutonomyOfExperts")
        matrices = experts.up if experts.gate is None else experts.gate
        norms = torch.stack([exact_logits(inputs.x, matrix).norm(dim=-1) for matrix in matrices], dim=-1)
        chosen = best(norms, self.top_k)
        weights = softmax(norms.gather(-1, chosen))
        return self.chose(inputs, chosen, weights, scores=softmax(norms), logits=norms)
