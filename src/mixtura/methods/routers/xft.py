"""XFT: one expert that every token visits, weighted by how unsure the router is of the others."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, squared_variation
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import beside_unused, best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 70,
    "title": "XFT: Unlocking the Power of Code Instruction Tuning by Simply Merging Upcycled "
    "Mixture-of-Experts",
    "tags": ["normalized", "token_independent"],
}


@final
class Xft(Router):
    """Send every token to expert 0 and to the best of the others, the shared one for what these leave open.

    With p the softmax over the experts but the first, of which a token gets the ``top_k - 1`` most probable
    and m the largest of p: the first expert, which is shared, is weighted by ``1 - m``; the chosen others
    share m, by a softmax of their probabilities. So weights sum to one, an upcycled model computes what the
    dense one did, and a router that is unsure leaves a token to the shared expert. The gate is
    ``outer @ tanh(inner @ x)``. The loss ``importance`` is ``coefficient`` times the squared coefficient
    of variation of the summed probabilities of what was chosen.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``inner [E - 1, D]`` and
        ``outer [E - 1, E - 1]``. In scores the shared expert has a half, the others p over 2.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or ``coefficient`` not in [0, 1e6].

    Example:
        >>> router = Xft(LayerShape(d_model=4, d_expert=8, num_experts=4), top_k=2)
        >>> routing = router(RouterInput.of(torch.zeros(1, 4)))
        >>> routing.expert_ids.tolist(), [round(w, 3) for w in routing.weights.tolist()]
        ([0, 1], [0.667, 0.333])

    Differences from the paper:
        Without the released code's noise, whose size is learned and begins at softplus(0) + 0.01, and the
        loss of the load that needs it; ``noisy_top_k`` has both. As there, a softmax is taken of chosen
        probabilities, and not of their logits. ``top_k`` is 2 by default (there 6 of 8 experts). With 1 only
        the shared expert is visited. Merging is not the router's: `mixtura condense --shares learned`
        does it for models of mixtral, qwen3_moe and flex_olmo, and not for those that this router is in.

    Reference:
        XFT: Unlocking the Power of Code Instruction Tuning by Simply Merging Upcycled Mixture-of-Experts
        (arXiv 2404.15247; paper 70); repository ise-uiuc/xft, ``TopKUniversalBalancedNoisyGate``.
    """

    def __init__(
        self, shape: LayerShape, *, top_k: int = 2, coefficient: float = 0.01, seed: int = 0
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.coefficient = self.within("coefficient", coefficient, 0, 1e6)
        self.seed = seed
        others = shape.num_experts - 1
        self.inner = drawn(seed, max(1, others), shape.d_model)
        self.outer = drawn(seed + 1, others, max(1, others))

    def forward(self, inputs: RouterInput) -> Routing:
        gates = exact_logits(exact_logits(inputs.x, self.inner).tanh(), self.outer)
        # As probable as all others together.
        logits = torch.cat([gates.logsumexp(-1, keepdim=True), gates], dim=-1)
        shared = torch.zeros_like(logits[:, :1], dtype=torch.int64)
        if not gates.shape[1] or self.top_k == 1:
            unused = [one for one in (self.inner, self.outer) if one.numel()]
            weights = beside_unused(torch.ones_like(logits[:, :1]), *unused)
            whole = torch.zeros_like(logits) if not gates.shape[1] else logits
            return self.chose(inputs, shared, weights, scores=softmax(whole), logits=whole)
        probabilities = softmax(gates)
        others = best(probabilities, self.top_k - 1)
        mine = probabilities.gather(-1, others)
        most = mine[:, :1]
        weights = torch.cat([1 - most, mine.softmax(-1) * most], dim=-1)
        table = torch.zeros_like(probabilities).scatter(-1, others, mine)
        importance = squared_variation(table[inputs.valid].sum(0))
        return self.chose(
            inputs,
            torch.cat([shared, others + 1], dim=-1),
            weights,
            scores=softmax(logits),
            logits=logits,
            losses={"importance": self.coefficient * importance},
        )
