"""GW-MoE: tokens of which the router is unsure are broadcast to all experts in fine-tuning."""

from __future__ import annotations

import math
from typing import final

import torch

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import entropy, softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed, rank_in_sequence
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 129,
    "title": "GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory",
    "tags": [
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:sequence_ids",
    ],
}


@final
class GwMoe(Router):
    """In training send tokens with an uncertain routing to all experts, weighted by their probabilities.

    A token is uncertain if the entropy of its probabilities is at least ``threshold`` times the highest
    there is, ``ln E``. At most ``max_slots`` uncertain tokens of a sequence are broadcast, the earliest
    ones, so no token depends on later ones. All other tokens, and all tokens at inference, take their
    ``top_k`` most probable experts, whose probabilities are divided by their sum if ``renormalize``; of
    equal ones the lowest index. An uncertain token thus learns from every expert, and it matters less
    which ones it gets at inference, which costs nothing more.

    Shapes:
        ``x [T, D]`` to between ``T * top_k`` and ``T * E`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``threshold`` not in [0, 1], or ``max_slots`` not in
            [0, 1e8].

    Example:
        >>> router = GwMoe(LayerShape(d_model=4, d_expert=8, num_experts=3), top_k=1, max_slots=1)
        >>> unsure = torch.zeros(2, 4)
        >>> [router(RouterInput.of(unsure, training=mode)).load.tolist() for mode in (True, False)]
        [[2, 1, 1], [2, 0, 0]]

    Differences from the paper:
        The threshold is a share of the highest entropy instead of nats, so that it does not depend on E.
        Slots are counted in order of arrival, as in the released code; what that code adds for an uncertain
        token is not its experts' outputs, and the paper's sum is used here. With ``top_k=1`` the weight of a
        sure token is 1 unless ``renormalize`` is off, so that only uncertain ones train the router.

    Reference:
        GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory (paper 129); repository
        WaitHZ/GW-MoE.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        threshold: float = 0.9,
        max_slots: int = 64,
        renormalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.threshold = self.within("threshold", threshold, 0, 1)
        self.max_slots = self.within("max_slots", max_slots, 0, 1e8)
        self.renormalize = renormalize
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        num_experts = self.shape.num_experts
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen, weights = best_weighed(
            scores, num_experts if inputs.training else self.top_k, renormalize=False
        )
        if inputs.training:
            # Equal probabilities may come out a rounding below the highest entropy.
            unsure = entropy(scores) >= self.threshold * math.log(num_experts) - 1e-6
            alike = torch.zeros_like(scores[:, :1])
            arrival = rank_in_sequence(alike, inputs.valid & unsure, inputs.sequences)[:, 0]
            broadcast = unsure & (arrival < self.max_slots)
            kept = (torch.arange(num_experts, device=chosen.device) < self.top_k) | broadcast[:, None]
            chosen = chosen.masked_fill(~kept, num_experts)
            weights = weights * kept
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
