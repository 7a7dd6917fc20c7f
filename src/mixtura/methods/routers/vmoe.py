"""V-MoE: noisy top-k in which the most important tokens of the batch are served first."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, final

import torch

from mixtura.errors import check_range
from mixtura.methods._capacity import places_in_rounds, room
from mixtura.methods._drawing import normal_like, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, squared_variation
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 140,
    "title": "Routers in Vision Mixture of Experts: An Empirical Study",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "batch_dependent",
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:causal",
        "reads:generator",
    ],
}


@final
class Vmoe(Router):
    """Top-k of a noisy softmax with little room, given to the tokens of highest priority first.

    An expert has room for ``capacity_factor * top_k * tokens / E`` tokens (rounded up). First choices of all
    tokens go before second choices, and within them tokens go by ``priority``: the probability of their
    best expert (``"best"``), the sum over their chosen experts (``"sum"``), or their place (``"arrival"``).
    With little room the tokens dropped are then the unimportant ones. Weights are the probabilities, not
    renormalised. In training noise of standard deviation ``noise / E`` is added to the logits, and the
    losses ``importance`` and ``load``, squared coefficients of variation of the experts' summed
    probabilities and of their expected tokens under new noise, even out the experts. Of equal
    probabilities the lowest index is taken. Priority looks at the whole batch, so at inference in a
    decoder there is no limit.

    Shapes:
        ``x [T, D]`` to at most ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or another number not in [0, 1e6].

    Example:
        >>> router = Vmoe(LayerShape(d_model=1, d_expert=8, num_experts=2), top_k=1, capacity_factor=1.0)
        >>> with torch.no_grad():
        ...     _ = router.weight.copy_(torch.tensor([[1.0], [0.0]]))
        >>> routing = router(RouterInput.of(torch.tensor([[1.0], [3.0], [2.0], [0.5]]), causal=False))
        >>> routing.token_ids.tolist()
        [1, 2]

    Differences from the paper:
        The study's other routers are ``expert_choice``, ``transport_choice``, ``sinkhorn`` and the mixer
        ``soft_moe``. The batch is one group. Without a generator there is no noise and no load loss. The
        rule for decoding is ours.

    Reference:
        Routers in Vision Mixture of Experts: An Empirical Study (paper 140, abstract); repository
        google-research/vmoe.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        capacity_factor: float = 1.05,
        noise: float = 1.0,
        priority: Literal["best", "sum", "arrival"] = "best",
        coefficient: float = 0.005,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("Vmoe", "top_k", top_k, 1, shape.num_experts)
        check_range("Vmoe", "capacity_factor", capacity_factor, 0, 1e6)
        check_range("Vmoe", "noise", noise, 0, 1e6)
        check_range("Vmoe", "coefficient", coefficient, 0, 1e6)
        self.top_k, self.capacity_factor, self.noise = top_k, capacity_factor, noise
        self.priority, self.coefficient, self.seed = priority, coefficient, seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        clean = logits = exact_logits(inputs.x, self.weight)
        losses = {"importance": self.coefficient * squared_variation(softmax(clean)[inputs.valid].sum(0))}
        if inputs.training and self.noise and inputs.generator is not None:
            spread = self.noise / self.shape.num_experts
            logits = clean + spread * normal_like(clean, inputs.generator)
            bar = logits.sort(-1, descending=True).values[:, self.top_k - 1, None]
            likely = torch.special.ndtr((clean - bar) / spread)[inputs.valid].sum(0)
            losses["load"] = self.coefficient * squared_variation(likely)
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, self.top_k, renormalize=False)
        wanted = torch.bincount(chosen[inputs.valid].flatten(), minlength=self.shape.num_experts)
        if inputs.may_look_ahead:
            rated = {
                "best": weights[:, 0],
                "sum": weights.sum(-1),
                "arrival": torch.zeros_like(weights[:, 0]),
            }
            capacity = room(inputs.valid, self.shape.num_experts, self.capacity_factor, self.top_k)
            places = places_in_rounds(chosen, rated[self.priority], inputs.valid, self.shape.num_experts)
            chosen = chosen.masked_fill(places >= capacity, self.shape.num_experts)
        routing = self.chose(inputs, chosen, weights, scores=scores, logits=logits, losses=losses)
        return replace(routing, demand=wanted)
