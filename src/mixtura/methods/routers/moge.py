"""Mixture of grouped experts: equally many experts from each group of experts, so that devices are even."""

from __future__ import annotations

from typing import final

from mixtura.errors import SettingError, check_range
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_per_group
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 162,
    "title": "Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity",
    "tags": ["token_independent", "keeps_weights"],
}


@final
class Moge(Router):
    """Take ``top_k / num_groups`` experts from each of ``num_groups`` groups, one group a device.

    Scores are one softmax over all experts; in each group the experts of highest score are taken, so every
    token brings every device the same work and device loads are equal whatever the router learns. The
    chosen scores are the weights, divided by their sum if ``renormalize``. Of equal scores in a group the
    expert of lowest index is taken.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``; a group is a run of
        ``E / num_groups`` experts.

    Raises:
        SettingError: ``top_k`` or ``num_groups`` is not in [1, E], or ``num_groups`` does not divide both
            ``top_k`` and E.

    Example:
        >>> import torch
        >>> router = Moge(LayerShape(d_model=4, d_expert=8, num_experts=4), top_k=2, num_groups=2)
        >>> load = router(RouterInput.of(torch.eye(4))).load
        >>> load[:2].sum().item(), load[2:].sum().item()
        (4, 4)

    Differences from the paper:
        Its auxiliary loss evens out experts inside the groups: use a balancer. Public code that runs the
        model leaves the chosen scores as they are, which is the default, and multiplies them by a learned
        scale for each expert, which is not here. Only the abstract was at hand.

    Reference:
        Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity (paper 162, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        num_groups: int = 2,
        renormalize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("Moge", "top_k", top_k, 1, shape.num_experts)
        check_range("Moge", "num_groups", num_groups, 1, shape.num_experts)
        if shape.num_experts % num_groups or top_k % num_groups:
            raise SettingError(
                f"num_groups of Moge must divide the {shape.num_experts} experts and top_k={top_k}, "
                f"got {num_groups}"
            )
        self.top_k = top_k
        self.num_groups = num_groups
        self.renormalize = renormalize
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen = best_per_group(scores, self.num_groups, self.top_k // self.num_groups)
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
