"""AdaMoE: null experts let every token decide how many experts it uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch

from mixtura.methods._drawing import drawn, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, choice_shares
from mixtura.methods.settings import settings
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 114,
    "title": "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
    "tags": ["token_independent", "lowest_index", "keeps_weights"],
    "gaps": {
        "check_kept_weights_decide": "a trained model has no null experts, whose rows start at random; some "
        "tokens take them until they are trained",
    },
}


@final
class AdaMoe(Router):
    """Let tokens choose among true experts and null experts, which do nothing and cost nothing.

    Each token takes the ``num_choices`` most probable of E true and ``num_null`` null experts, so it uses
    between none and ``num_choices`` true ones. Their probabilities are divided by their sum; a token that
    took null experts alone gets nothing. The loss ``balance`` is
    ``coefficient * (E + num_null) * sum_i f_i * P_i`` over true and null experts, ``f_i`` the share of the
    choices and ``P_i`` the mean probability, where every null expert counts with the mean ``f`` of the null
    experts: how much they are used together is balanced, how they share it is not. Evenly used, a token has
    ``num_choices * E / (E + num_null)`` true experts on average. Of equal probabilities the true expert of
    lowest index is taken first.

    Shapes:
        ``x [T, D]`` to at most ``T * num_choices`` assignments; parameters ``weight [E, D]`` and
        ``null [num_null, D]``.

    Raises:
        SettingError: ``num_null`` is not in [0, 4096], ``num_choices`` not in [1, E + num_null], or
            ``coefficient`` not in [0, 1e6].

    Example:
        >>> router = AdaMoe(LayerShape(d_model=2, d_expert=8, num_experts=2), num_null=1, num_choices=2)
        >>> with torch.no_grad():
        ...     _ = router.weight.copy_(torch.eye(2)), router.null.fill_(0.5)
        >>> router(RouterInput.of(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))).load.tolist()
        [2, 1]

    Differences from the paper:
        ``f`` is a share of all choices rather than of the tokens, so that the balanced value does not depend
        on their number. The mean of the null loads is that of the paper; in the released code it has no
        effect.

    Reference:
        AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models (paper 114);
        repository CengZihao/AdaMoE.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_null: int = 8,
        num_choices: int = 4,
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.num_null = self.within("num_null", num_null, 0, 4096)
        self.num_choices = self.within("num_choices", num_choices, 1, shape.num_experts + num_null)
        self.coefficient = self.within("coefficient", coefficient, 0, 1e6)
        self.seed = seed
        self.weight = router_weight(shape, seed)
        self.null = drawn(seed + 1, num_null, shape.d_model)

    @classmethod
    def settings_for(cls, top_k: int, shape: LayerShape, given: Mapping[str, Any]) -> dict[str, Any]:
        """As many choices as leave ``top_k`` true experts on average when all are evenly used."""
        num_null = given.get("num_null", settings(cls)["num_null"].default)
        return {"num_choices": math.ceil(top_k * (shape.num_experts + num_null) / shape.num_experts)}

    def forward(self, inputs: RouterInput) -> Routing:
        num_experts = self.shape.num_experts
        logits = exact_logits(inputs.x, torch.cat([self.weight, self.null]))
        scores = softmax(logits)
        chosen = best(scores, self.num_choices)
        weights = to_sum_one(scores.gather(-1, chosen) * (chosen < num_experts))
        used, likely = choice_shares(chosen, scores, inputs.valid)
        null_load = used[num_experts:].mean() if self.num_null else used.new_zeros(())
        used = torch.cat([used[:num_experts], null_load.expand(self.num_null)])
        return self.chose(
            inputs,
            chosen,
            weights,
            scores=scores[:, :num_experts],
            logits=logits[:, :num_experts],
            losses={"balance": self.coefficient * scores.shape[1] * (used * likely).sum()},
        )
