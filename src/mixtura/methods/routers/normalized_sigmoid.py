"""Normalised sigmoid gating: experts are scored one by one, the chosen scores divided by their sum."""

from __future__ import annotations

from typing import Literal, final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import masked, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 128,
    "title": "On DeepSeekMoE: Statistical Benefits of Shared Experts and Normalized Sigmoid Gating",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:selection_bias",
        "reads:allowed",
    ],
}


@final
class NormalizedSigmoid(Router):
    """Score each expert by a sigmoid of its own logit and take the ``top_k`` best.

    Unlike in a softmax no expert's score depends on the other experts, so experts do not compete for
    probability. The weights are the chosen scores over their sum (``over="chosen"``), or over the sum of
    all experts' scores (``"all"``). Of equal scores the expert of lowest index is taken; a
    ``selection_bias`` is added when choosing and never enters the weights. The gate of DeepSeek-V3, which
    is this one within groups of experts, is the router ``deepseek_v3``, which can also leave out the
    normalising.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E].

    Example:
        >>> import torch
        >>> router = NormalizedSigmoid(LayerShape(d_model=2, d_expert=8, num_experts=3), top_k=2)
        >>> with torch.no_grad():
        ...     _ = router.weight.copy_(torch.tensor([[9.0, 0.0], [9.0, 0.0], [-9.0, 0.0]]))
        >>> router(RouterInput.of(torch.eye(2)[:1])).weights.tolist()
        [0.5, 0.5]

    Differences from the paper:
        The paper analyses this gate next to shared experts, which are given to the layer
        (``MoELayer(shared=...)``), not to its router. Only the abstract was at hand.

    Reference:
        On DeepSeekMoE: Statistical Benefits of Shared Experts and Normalized Sigmoid Gating (paper 128,
        abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        over: Literal["chosen", "all"] = "chosen",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.over = over
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = logits.sigmoid()
        wanted = scores if inputs.selection_bias is None else scores + inputs.selection_bias
        wanted = masked(wanted, inputs.allowed)
        chosen = best(wanted, self.top_k)
        weights = scores.gather(-1, chosen).masked_fill(wanted.gather(-1, chosen).isneginf(), 0.0)
        weights = to_sum_one(weights, None if self.over == "chosen" else scores.sum(-1, keepdim=True))
        return self.chose(inputs, present(chosen, wanted), weights, scores=scores, logits=logits)
