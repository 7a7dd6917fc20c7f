"""Pre-gated: the gate of one layer decides for the layer after it."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import beside_unused, best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 179,
    "title": (
        "Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference"
    ),
    "tags": ["normalized", "token_independent", "lowest_index", "stateful", "reads:state"],
}


@final
class PreGated(Router):
    """Decide for the next MoE layer, so that its experts can be fetched while this one's compute.

    The router's rows give the logits of the *next* layer from this layer's tokens; they are handed on as
    ``state``. This layer follows the state of the layer before. The first layer, which has none before
    it, decides for itself by rows of its own. Choosing is top-k of a softmax, weights renormalised.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments, ``state [T, E]``; parameters ``weight [E, D]`` for the
        next layer and ``first [E, D]``, used where no state is given.

    Raises:
        SettingError: ``top_k`` is not in [1, E].
        UserError: the state is not of as many experts as this layer has.

    Example:
        >>> import torch
        >>> router = PreGated(LayerShape(d_model=4, d_expert=8, num_experts=3), top_k=1)
        >>> tokens = RouterInput.of(torch.eye(4))
        >>> handed = router(tokens).state
        >>> after = router(RouterInput.of(torch.zeros(4, 4), state=handed))
        >>> bool((after.logits == handed).all())
        True

    Differences from the paper:
        Every layer holds rows for a first decision, used in the first layer only; the last layer's
        decision for a next one is dropped. Only the abstract and its summary were at hand.

    Reference:
        Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference
        (paper 179, abstract).
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.seed = seed
        self.weight = router_weight(shape, seed)
        self.first = router_weight(shape, seed + 1)

    def forward(self, inputs: RouterInput) -> Routing:
        handed = self.handed(inputs, self.shape.num_experts)
        logits = exact_logits(inputs.x, self.first) if handed is None else exact(handed)
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, self.top_k)
        # The first layer alone uses ``first``, and nothing uses what the last hands on.
        weights = beside_unused(weights, self.first, self.weight)
        state = exact_logits(inputs.x, self.weight)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits, state=state)
