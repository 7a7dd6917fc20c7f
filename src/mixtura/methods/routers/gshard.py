"""GShard's top-2: a first expert always, a second by chance, and room for so many tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch

from mixtura.errors import check_range
from mixtura.methods._capacity import places_in_rounds, room
from mixtura.methods._drawing import router_weight, uniform_like
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
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
class Gshard(Router):
    """Send each token to its two most probable experts, the second at random, unless they are full.

    The two probabilities are divided by their sum. In training the second expert is kept with a chance
    of twice its weight, so that it is left out where it matters little (``random_second``). An expert
    has room for ``2 * capacity_factor * tokens / experts`` tokens, rounded up; all first choices go
    before all second ones, and earlier tokens before later ones. Of equal scores the expert of lowest
    index is chosen. Room and queue are those of the whole batch, which a decoder does not know at
    inference: there it has no limit.

    Shapes:
        ``x [T, D]`` to at most 2T assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``capacity_factor`` is not in [0, 1e6], or there are fewer than two experts.

    Example:
        >>> shape = LayerShape(d_model=2, d_expert=8, num_experts=4)
        >>> same = RouterInput.of(torch.ones(6, 2), training=True)
        >>> sorted(Gshard(shape, capacity_factor=1.0)(same).load.tolist())
        [0, 0, 3, 3]

    Differences from the paper:
        Tokens of the whole batch share one capacity instead of being cut into groups with one each. Its
        balancing loss, which counts first choices only, is left to a balancer. Without a generator the
        second expert is always kept, as in evaluation. That there is no limit at inference in a decoder is
        ours.

    Reference:
        GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        capacity_factor: float = 1.0,
        random_second: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("Gshard", "number of experts", shape.num_experts, 2, float("inf"))
        self.capacity_factor = self.within("capacity_factor", capacity_factor, 0, 1e6)
        self.random_second = random_second
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, 2)
        if inputs.training and self.random_second and inputs.generator is not None:
            luck = uniform_like(weights[:, 1].detach(), inputs.generator)
            unlucky = 2 * weights[:, 1].detach() <= luck
            absent = torch.stack([torch.zeros_like(unlucky), unlucky], dim=-1)
            chosen = chosen.masked_fill(absent, self.shape.num_experts)
        plain = self.chose(inputs, chosen, weights, scores=scores, logits=logits)
        if not inputs.may_look_ahead:
            return plain
        arrival = torch.zeros_like(weights[:, 0])
        places = places_in_rounds(chosen, arrival, inputs.valid, self.shape.num_experts)
        capacity = room(inputs.valid, self.shape.num_experts, self.capacity_factor, 2)
        kept = chosen.masked_fill(places >= capacity, self.shape.num_experts)
        limited = self.chose(inputs, kept, weights, scores=scores, logits=logits)
        return replace(limited, demand=plain.load)
