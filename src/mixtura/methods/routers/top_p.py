"""Top-p: as many experts as it takes to be sure enough."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import masked, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 3,
    "title": "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    "tags": ["token_independent", "lowest_index", "keeps_weights", "reads:allowed"],
}


@final
class TopP(Router):
    """Send each token to its most probable experts until their probabilities together reach ``p``.

    Experts are taken in order of their softmax probability, the one that crosses ``p`` included, so a
    token has at least one expert, and the more the less sure its router is. An expert's output is
    weighted by its probability as it is. Of equally probable experts the one of lowest index comes
    first. The balancer ``entropy`` keeps probabilities from spreading, and so the number of experts low.

    Shapes:
        ``x [T, D]`` to between T and ``T * E`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``p`` is not in [0, 1].

    Example:
        >>> import torch
        >>> router = TopP(LayerShape(d_model=2, d_expert=8, num_experts=4), p=0.5)
        >>> unsure = router(RouterInput.of(torch.zeros(1, 2)))
        >>> unsure.expert_ids.tolist(), unsure.weights.tolist()
        ([0, 1], [0.25, 0.25])

    Differences from the paper:
        Its entropy loss is the balancer ``entropy`` and its load loss the balancer ``switch_loss``,
        for any router to use. That weights are not renormalised is as in its code.

    Reference:
        Harder Tasks Need More Experts: Dynamic Routing in MoE Models (paper 3); the authors' inference
        code, ZhenweiAn/Dynamic_MoE, as summarised.
    """

    def __init__(self, shape: LayerShape, *, p: float = 0.4, seed: int = 0) -> None:
        super().__init__(shape)
        self.p = self.within("p", p, 0, 1)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        usable = masked(logits, inputs.allowed)
        scores = softmax(usable)
        order = best(scores, self.shape.num_experts)
        weights = scores.gather(-1, order)
        before = (weights.cumsum(-1) - weights).detach()
        needed = before < self.p
        needed[:, 0] = True
        return self.chose(
            inputs,
            present(order, usable).masked_fill(~needed, self.shape.num_experts),
            weights,
            scores=scores,
            logits=logits,
        )
