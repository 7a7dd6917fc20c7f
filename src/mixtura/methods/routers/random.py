"""Random routing: the baseline that every learned router must beat."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.methods._drawing import uniform_like
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Experts drawn at random, the baseline of routers",
    "tags": ["normalized", "token_independent", "reads:generator", "reads:positions"],
}


@final
class Random(Router):
    """Send each token to ``top_k`` experts drawn at random, all equally likely.

    The draw is from the generator, and takes no notice of the token. Without a generator, as at
    inference, it is a fixed function of ``seed`` and the token's position, so that it can be repeated;
    give layers different seeds. Weights are ``1 / top_k``, scores ``1 / E`` and not what was drawn. Nothing
    is learned.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; no parameters.

    Raises:
        SettingError: ``top_k`` is not in [1, E].
        UserError: neither a generator nor positions are given.

    Example:
        >>> router = Random(LayerShape(d_model=2, d_expert=8, num_experts=4), top_k=2)
        >>> routing = router(RouterInput.of(torch.zeros(100, 2), generator=torch.Generator()))
        >>> routing.load.sum().item(), bool((routing.load > 30).all())
        (200, True)
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.seed = seed

    def forward(self, inputs: RouterInput) -> Routing:
        num_experts = self.shape.num_experts
        scores = inputs.x.new_full((inputs.x.shape[0], num_experts), 1 / num_experts)
        if inputs.generator is not None:
            drawn = uniform_like(scores.float(), inputs.generator)
        else:
            drawn = self._by_position(inputs.need("positions", "Random"))
        chosen = best(drawn, self.top_k)
        return Routing.from_choices(
            chosen,
            scores.new_full(chosen.shape, 1 / self.top_k),
            scores=scores,
            logits=torch.zeros_like(scores),
            valid=inputs.valid,
        )

    def _by_position(self, positions: Int[Tensor, " T"]) -> Float[Tensor, "T E"]:
        """Numbers in [0, 1) that look random and depend on position, expert and seed alone."""
        experts = torch.arange(self.shape.num_experts, device=positions.device)
        mixed = (positions[:, None] * self.shape.num_experts + experts + self.seed * 40503 % 2**31) % 2**31
        for factor in (0x45D9F3B, 0x2C1B3C6D, 0x297A2D39):
            # Products stay below 2^61, so no integer overflows.
            mixed = ((mixed ^ (mixed >> 15)) * factor) % 2**31
        return mixed.double() / 2**31
