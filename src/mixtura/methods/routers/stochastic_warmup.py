"""Top-k whose first steps are noise: the router is let in little by little, so that all experts learn."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import normal_like, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 157,
    "title": "Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:step",
        "reads:generator",
    ],
}


@final
class StochasticWarmup(Router):
    """Send each token to the ``top_k`` experts of highest probability, in the first steps to random ones.

    In training the logits are ``(1 - a) * noise + a * logits`` with standard normal noise, where ``a`` rises
    from 0 to 1 over ``warmup_steps`` steps of the optimizer. So at first every expert gets its share of every
    kind of token, and an untrained router cannot starve any. Afterwards, and at inference always, it is plain
    top-k.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or the steps are not in [0, 1e8].

    Example:
        >>> import torch
        >>> router = StochasticWarmup(LayerShape(d_model=4, d_expert=8, num_experts=3), warmup_steps=10)
        >>> [router.share(step) for step in (0, 5, 10, 20)]
        [0.0, 0.5, 1.0, 1.0]

    Differences from the paper:
        Only summaries of the report were read: that there is a warm-up by random routing, not its formula.
        The mixture of logits, its noise and 1000 steps are ours. Weights are those of the mixed logits.

    Reference:
        Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs (paper 157).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        warmup_steps: int = 1000,
        renormalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.warmup_steps = self.within("warmup_steps", warmup_steps, 0, 10**8)
        self.renormalize = renormalize
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        share = self.share(inputs.step)
        if inputs.training and inputs.generator is not None and share < 1:
            logits = (1 - share) * normal_like(logits, inputs.generator) + share * logits
        scores = softmax(logits)
        chosen = best(scores, self.top_k)
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)

    def share(self, step: int) -> float:
        """How much of the logits is the router's own after so many steps."""
        return min(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
