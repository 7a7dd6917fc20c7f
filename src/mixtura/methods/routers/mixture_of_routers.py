"""Mixture of routers: several routers vote, and a main router says how much each vote counts."""

from __future__ import annotations

from typing import Literal, final

import torch

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 60,
    "title": "Mixture of Routers",
    "tags": ["normalized", "token_independent", "lowest_index"],
}


@final
class MixtureOfRouters(Router):
    """Score experts by ``num_routers`` sub-routers, mixed token by token by a main router.

    Each sub-router gives a softmax over the experts; the main router gives a softmax over the
    sub-routers, which weighs theirs. The ``top_k`` experts of highest mixed score are chosen, so that
    the mistake of one sub-router is made good by the others; weights are the chosen scores over their
    sum. With ``mix="logits"`` logits are mixed and the softmax taken afterwards. Of equal scores the
    expert of lowest index is chosen.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``routers [R, E, D]`` and ``main [R, D]``,
        R = ``num_routers``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or ``num_routers`` not in [1, 1e4].

    Example:
        >>> router = MixtureOfRouters(LayerShape(d_model=4, d_expert=8, num_experts=3), num_routers=2)
        >>> scores = router(RouterInput.of(torch.eye(4))).scores
        >>> torch.allclose(scores.sum(-1), torch.ones(4))
        True

    Differences from the paper:
        There experts are low-rank adapters; here they are whatever the layer has. Written from the
        abstract, which does not say whether probabilities or logits are mixed: ``mix`` has both.

    Cost:
        The product with the rows and the softmax are done ``num_routers`` times, and their table passed
        over to mix it.

    Reference:
        Mixture of Routers (paper 60, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        num_routers: int = 3,
        mix: Literal["scores", "logits"] = "scores",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.num_routers = self.within("num_routers", num_routers, 1, 1e4)
        self.mix = mix
        self.seed = seed
        self.routers = drawn(seed, num_routers, shape.num_experts, shape.d_model)
        self.main = drawn(seed + 1, num_routers, shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        say = softmax(exact_logits(inputs.x, self.main))[:, :, None]
        votes = exact_logits(inputs.x, self.routers.flatten(0, 1)).unflatten(-1, self.routers.shape[:2])
        if self.mix == "logits":
            logits = (say * votes).sum(1)
            scores = softmax(logits)
        else:
            scores = (say * votes.softmax(-1)).sum(1)
            logits = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
