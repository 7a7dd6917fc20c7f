"""SAM: a switch picks one group of experts, a mixture mixes several experts of that group."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import drawn, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._levels import two_levels
from mixtura.methods.routers._losses import unevenness
from mixtura.methods.routers._shared import check_parts
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 86,
    "title": "Towards More Effective and Economic Sparsely-Activated Model",
    "tags": ["expert_rows", "token_independent", "lowest_index"],
}


@final
class SwitchAndMixture(Router):
    """Send each token to one group of experts, such as a GPU's, and there to its ``group_top_k`` best.

    A switch router takes the group of highest probability; a mixture router, with rows of its own for
    every expert, takes the best experts of that group. All experts of a token are on one device, so more
    of them cost no more communication. A weight is the group's probability times the expert's share
    among those chosen, so both routers learn. Experts ``0 .. E / num_groups - 1`` are the first group,
    and so on. Of equal scores the lowest index wins. The loss ``balance`` evens out the groups.

    Shapes:
        ``x [T, D]`` to ``T * group_top_k`` assignments; parameters ``group_weight [G, D]`` and
        ``weight [E, D]``.

    Raises:
        SettingError: ``num_groups`` does not divide E, ``group_top_k`` is not in [1, E / num_groups], or
            ``balance_coefficient`` not in [0, 1e6].

    Example:
        >>> import torch
        >>> router = SwitchAndMixture(LayerShape(d_model=4, d_expert=8, num_experts=6), num_groups=3)
        >>> router(RouterInput.of(torch.zeros(2, 4))).expert_ids.tolist()
        [0, 0, 1, 1]

    Differences from the paper:
        The loss is the Switch Transformer's over groups. Evening out experts inside a group is left to a
        balancer. ``scores`` are the group's probability times the expert's softmax in its group. Only
        the abstract and its summary were at hand, so losses the paper may have besides are not here.

    Reference:
        Towards More Effective and Economic Sparsely-Activated Model (paper 86, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_groups: int = 2,
        group_top_k: int = 2,
        balance_coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_parts("SwitchAndMixture", "num_groups", num_groups, shape.num_experts)
        size = shape.num_experts // num_groups
        self.num_groups = num_groups
        self.group_top_k = self.within("group_top_k", group_top_k, 1, size)
        self.balance_coefficient = self.within("balance_coefficient", balance_coefficient, 0, 1e6)
        self.seed = seed
        self.group_weight = drawn(seed + 1, num_groups, shape.d_model)
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        local_logits = exact_logits(inputs.x, self.weight).unflatten(-1, (self.num_groups, -1))
        levels = two_levels(exact_logits(inputs.x, self.group_weight), local_logits, self.group_top_k)
        shares = to_sum_one(levels.within.gather(-1, levels.local))
        crowding = unevenness(levels.place, levels.places, inputs.valid)
        return self.chose(
            inputs,
            levels.chosen,
            levels.places.gather(-1, levels.place) * shares,
            scores=levels.scores,
            logits=levels.logits,
            losses={"balance": self.balance_coefficient * crowding},
        )
