"""The router of most open models: softmax, then the k most probable experts."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import plain_logits
from mixtura.methods._scores import masked, softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Top-k of a softmax over all experts",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "compiles",
        "reads:selection_bias",
        "reads:allowed",
    ],
}


@final
class TopK(Router):
    """Send each token to the ``top_k`` experts of highest softmax probability.

    An expert's output is weighted by its probability, divided by the sum of the chosen ones if
    ``renormalize``. Of equally probable experts the one of lowest index is taken. A
    ``selection_bias`` is added when choosing and never enters the weights.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E].

    Example:
        >>> import torch
        >>> router = TopK(LayerShape(d_model=4, d_expert=8, num_experts=3), top_k=2)
        >>> routing = router(RouterInput.of(torch.eye(4)))
        >>> routing.load.tolist(), routing.weights.shape
        ([3, 2, 3], torch.Size([8]))

    Differences from the paper:
        There is no one paper. This is the router of transformers' Mixtral and Qwen3-MoE, with the
        rule for equal probabilities made explicit and without noise.

    Reference:
        ``MixtralTopKRouter`` and ``Qwen3MoeTopKRouter`` in transformers 5.23.
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2, renormalize: bool = True, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.renormalize = renormalize
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = plain_logits(inputs.x, self.weight)
        scores = softmax(masked(logits, inputs.allowed))
        wanted = scores if inputs.selection_bias is None else scores + inputs.selection_bias
        wanted = masked(wanted, inputs.allowed)
        chosen = best(wanted, self.top_k)
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(inputs, present(chosen, wanted), weights, scores=scores, logits=logits)
