"""Omni-router: one router, with one set of weights, for all MoE layers of a model."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 144,
    "title": ("Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition"),
    "tags": ["expert_rows", "token_independent", "lowest_index", "shared"],
}


@final
class OmniRouter(Router):
    """Route in every layer by the same rows, so that the layers' choices agree and experts cooperate.

    The same instance stands in all MoE layers; each applies it to its own hidden states. As these change
    little from layer to layer, expert i of one layer gets mostly the tokens of expert i of the layer before,
    and the gradients of all layers train one router. Otherwise it is a Switch router: the ``top_k`` most
    probable experts (one by default), weighted by their probability, of equal ones the lowest index.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``, for all layers.

    Raises:
        SettingError: ``top_k`` is not in [1, E].

    Example:
        >>> import torch
        >>> from mixtura.modeling.layer import Experts, MoELayer
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> router = OmniRouter(shape)
        >>> layers = [MoELayer(router, Experts(shape, seed=seed)) for seed in (0, 1)]
        >>> x = torch.eye(4)
        >>> bool((layers[0](RouterInput.of(x))[1].logits == layers[1](RouterInput.of(x))[1].logits).all())
        True

    Differences from the paper:
        No limit on an expert's tokens: give the layers a ``Capacity`` for one. Only the abstract and a
        summary were at hand.

    Reference:
        Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition
        (paper 144, abstract).
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 1, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, self.top_k, renormalize=False)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
