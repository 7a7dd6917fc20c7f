"""The gate of DeepSeek-V3: sigmoid scores, choice within the best groups by a bias, scaled weights."""

from __future__ import annotations

from typing import final

from mixtura.errors import SettingError, check_range
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import masked, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_of_groups, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "DeepSeek-V3 Technical Report",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:selection_bias",
        "reads:allowed",
    ],
}


@final
class DeepseekV3(Router):
    """Take the ``top_k`` experts of highest sigmoid score plus bias from the ``top_groups`` best groups.

    Experts are scored one by one by a sigmoid. A ``selection_bias``, which loss-free balancing keeps, is
    added to choose and never enters the weights. The experts are cut into ``num_groups`` equal runs, one a
    device or node; a group is rated by the sum of its two highest biased scores, and only the best
    ``top_groups`` may be chosen from. The chosen scores are divided by their sum if ``renormalize`` and
    multiplied by ``scaling``. Of equal scores the lowest index goes first. With one group it is the router
    of dots.llm1.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` or ``num_groups`` is not in [1, E], ``num_groups`` does not divide E,
            ``top_groups`` is not in [1, num_groups], ``scaling`` not in [0, 1e6], or the groups that may be
            chosen from have fewer than ``top_k`` experts.

    Example:
        >>> import torch
        >>> shape = LayerShape(d_model=2, d_expert=8, num_experts=4)
        >>> router = DeepseekV3(shape, num_groups=2, top_groups=1, scaling=2.5)
        >>> with torch.no_grad():
        ...     _ = router.weight.copy_(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [2.0, 0.0], [2.0, 0.0]]))
        >>> routing = router(RouterInput.of(torch.eye(2)[:1]))
        >>> routing.expert_ids.tolist(), routing.weights.tolist()
        ([2, 3], [1.25, 1.25])

    Differences from the paper:
        The rule for equal scores is made explicit. The bias comes with the input, where a balancer's state
        puts it, rather than being a buffer of the router.

    Reference:
        ``DeepseekV3TopkRouter`` and ``Dots1TopkRouter`` in transformers 5.23. DeepSeek-V3 Technical Report.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scaling: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("DeepseekV3", "top_k", top_k, 1, shape.num_experts)
        check_range("DeepseekV3", "num_groups", num_groups, 1, shape.num_experts)
        check_range("DeepseekV3", "top_groups", top_groups, 1, num_groups)
        check_range("DeepseekV3", "scaling", scaling, 0, 1e6)
        if shape.num_experts % num_groups:
            raise SettingError(f"num_groups of DeepseekV3 must divide {shape.num_experts}, got {num_groups}")
        reachable = top_groups * (shape.num_experts // num_groups)
        if top_k > reachable:
            raise SettingError(
                f"top_k of DeepseekV3 is {top_k}, but its {top_groups} groups have {reachable} experts; "
                "choose more groups or fewer experts"
            )
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.renormalize = renormalize
        self.scaling = scaling
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = logits.sigmoid()
        wanted = scores if inputs.selection_bias is None else scores + inputs.selection_bias
        wanted = masked(wanted, inputs.allowed)
        chosen = best_of_groups(wanted, self.num_groups, self.top_groups, self.top_k, rated_by=2)
        weights = scores.gather(-1, chosen).masked_fill(wanted.gather(-1, chosen).isneginf(), 0.0)
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(
            inputs, present(chosen, wanted), self.scaling * weights, scores=scores, logits=logits
        )
