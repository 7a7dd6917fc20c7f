"""Progressive sparsification: lower layers begin with more experts a token and end with few."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 15,
    "title": "Sigma-Moe-Tiny Technical Report",
    "tags": [
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:layer",
        "reads:step",
    ],
}


@final
class SigmaMoe(Router):
    """Use more experts a token in the lower layers early in training, so that their loads can be balanced.

    With very many experts and one a token, a balancing loss becomes ineffective in the lowest layers.
    Until ``switch_step`` optimizer steps, the ``num_lower`` lowest MoE layers therefore use more experts:
    ``start_k`` in the first, falling by pairs of layers to ``top_k``; from then on every layer uses
    ``top_k``. With 8 lower layers that start at 8 these are 8, 8, 6, 6, 4, 4, 2, 2. Choosing is top-k of a
    softmax, weighted by the probabilities, divided by their sum if ``renormalize``; of equal ones the
    lowest index.

    Shapes:
        ``x [T, D]`` to ``T * k`` assignments, k of `num_active`; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``start_k`` not in [1, 1e6], ``num_lower`` not in
            [0, 4096], or ``switch_step`` not in [0, 1e8].

    Example:
        >>> router = SigmaMoe(LayerShape(d_model=4, d_expert=8, num_experts=8), switch_step=100, start_k=8)
        >>> [router.num_active(layer, 0) for layer in range(9)]
        [8, 8, 6, 6, 4, 4, 2, 2, 1]
        >>> router.num_active(0, 100)
        1

    Differences from the paper:
        The schedule above fills in what the abstract, which was all that was at hand, does not say. The
        balancing loss is a balancer's: ``switch_loss``.

    Reference:
        Sigma-Moe-Tiny Technical Report (paper 15, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        start_k: int = 4,
        num_lower: int = 8,
        switch_step: int = 1000,
        renormalize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.start_k = self.within("start_k", start_k, 1, 1e6)
        self.num_lower = self.within("num_lower", num_lower, 0, 4096)
        self.switch_step = self.within("switch_step", switch_step, 0, 1e8)
        self.renormalize = renormalize
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def num_active(self, layer: int, step: int) -> int:
        """Experts a token uses in an MoE layer after so many optimizer steps."""
        if layer >= self.num_lower or step >= self.switch_step:
            return self.top_k
        # Layers go by pairs; the division rounds up.
        lowered = -(-self.start_k * (self.num_lower - layer // 2 * 2) // self.num_lower)
        return min(max(self.top_k, lowered), self.shape.num_experts)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen, weights = best_weighed(
            scores, self.num_active(inputs.layer, inputs.step), renormalize=self.renormalize
        )
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
