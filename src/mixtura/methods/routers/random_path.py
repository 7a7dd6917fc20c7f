"""Duo-LLM's routing: random paths at first, so that every path works, then learnt ones within a budget."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods._drawing import drawn, uniform_like
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import mean_of_valid, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 138,
    "title": "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    "tags": ["token_independent", "reads:step", "reads:training", "reads:generator"],
    "gaps": {
        "check_gradient_matches_differences": "the chosen expert counts fully whatever its probability is"
    },
}


@final
class RandomPath(Router):
    """Send each token to one expert or past all of them: at random first, later as is learnt.

    In training before ``switch_step`` each token of each layer takes one of the E experts or the bypass, all
    equally likely, so that any path through the model works. From then on, and outside training, it takes the
    most probable of the E + 1. The chosen expert counts fully; its probability gets the gradient. The loss is
    ``coefficient * (mean cost - budget) ** 2``, with the cost that each token expects: ``costs`` of the
    experts, by default 1 each, and 0 of the bypass. Experts of different widths are ``unequal``.

    Shapes:
        ``x [T, D]`` to at most T assignments; one parameter, ``option_weight [E + 1, D]``, the last for the
        bypass.

    Raises:
        SettingError: ``switch_step`` is not in [0, 1e8], ``budget`` or ``coefficient`` not in [0, 1e6], or
        there
            is not one cost, finite and not negative, for each expert.

    Example:
        >>> router = RandomPath(LayerShape(d_model=4, d_expert=8, num_experts=2), switch_step=10)
        >>> inputs = RouterInput.of(torch.zeros(9000, 4), training=True, generator=torch.Generator())
        >>> [round(share, 1) for share in (router(inputs).load / 9000).tolist()]
        [0.3, 0.3]

    Differences from the paper:
        Only a summary of the paper was at hand: routers are trained in a stage of their own there, and how is
        not said. That the loss of a budget trains them, and that a chosen expert counts fully, is ours. The
        search for each token's best path is left out. Without a generator the learnt choice is taken.

    Reference:
        Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models (paper 138, abstract
        and a summary).
    """

    choice_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        shape: LayerShape,
        *,
        switch_step: int = 1000,
        budget: float = 0.5,
        coefficient: float = 1.0,
        costs: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.switch_step = self.within("switch_step", switch_step, 0, 1e8)
        self.budget = self.within("budget", budget, 0, 1e6)
        self.coefficient = self.within("coefficient", coefficient, 0, 1e6)
        found = [1.0] * shape.num_experts if costs is None else costs
        if len(found) != shape.num_experts or not all(0 <= one < float("inf") for one in found):
            raise SettingError(
                f"costs of RandomPath must be one number of 0 or more for each of {shape.num_experts} "
                f"experts, got {costs}"
            )
        self.costs = costs
        self.seed = seed
        self.option_weight = drawn(seed, shape.num_experts + 1, shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.option_weight)
        scores = softmax(logits)
        chosen = self._chosen(scores, inputs)
        taken = scores.gather(1, chosen)
        # One, whose gradient is that of the probability.
        weights = 1 + taken - taken.detach()
        found = self.costs or [1.0] * self.shape.num_experts
        costs = torch.tensor([*found, 0.0], dtype=scores.dtype, device=scores.device)
        over = mean_of_valid((scores * costs).sum(-1), inputs.valid) - self.budget
        known = int(bool(inputs.valid.any()))
        return self.chose(
            inputs,
            chosen,
            weights,
            scores=scores[:, :-1],
            logits=logits[:, :-1],
            losses={"budget": known * self.coefficient * over.square()},
        )

    def _chosen(self, scores: Float[Tensor, "T R"], inputs: RouterInput) -> Int[Tensor, "T 1"]:
        if not inputs.training or inputs.generator is None or inputs.step >= self.switch_step:
            return best(scores, 1)
        drawn_values = uniform_like(scores[:, :1], inputs.generator)
        return (drawn_values * scores.shape[1]).long().clamp(max=scores.shape[1] - 1)
