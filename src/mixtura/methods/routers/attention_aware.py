"""Attention-aware routing: tokens are routed like the tokens they attend to."""

from __future__ import annotations

from typing import Literal, final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import attended, best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 48,
    "title": "Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
    "tags": [
        "normalized",
        "lowest_index",
        "reads:attention",
        "reads:history",
        "reads:positions",
        "reads:sequence_ids",
    ],
    "gaps": {
        "check_logits_give_scores": "a score is the mean of several tokens' scores, a logit the token's own",
    },
}


@final
class AttentionAware(Router):
    """Route a token by the mean of the router's scores of the tokens it attends to.

    Every token is scored by a softmax over the experts; a token's score is then the mean of the scores
    of its sequence's tokens, weighted by its row of the attention of the layer before (the mean over
    heads). Tokens that look at the same things go the same way, and small changes of a token move it
    less. The ``top_k`` experts of highest mean score are chosen, of equal ones that of lowest index,
    and weighted by these scores over their sum. With ``mean_of="logits"`` logits are averaged instead,
    before the softmax. The scores of earlier tokens are carried along as history for decoding.

    Shapes:
        ``x [T, D]``, ``attention [T, C]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E].
        UserError: attention or positions are not given.

    Example:
        >>> import torch
        >>> router = AttentionAware(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> first_alone = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> tokens = RouterInput.of(torch.eye(4)[:2], attention=first_alone, positions=torch.arange(2))
        >>> scores = router(tokens).scores
        >>> bool((scores[0] == scores[1]).all())
        True

    Differences from the paper:
        Written from the abstract and a summary, which do not say whether scores are averaged before or
        after the softmax: ``mean_of`` has both.

    Reference:
        Improving Routing in Sparse Mixture of Experts with Graph of Tokens (paper 48, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        mean_of: Literal["scores", "logits"] = "scores",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.mean_of = mean_of
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        own = softmax(logits) if self.mean_of == "scores" else logits
        mean, history = attended(own, inputs, "AttentionAware")
        scores = mean if self.mean_of == "scores" else softmax(mean)
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits, history=history)
