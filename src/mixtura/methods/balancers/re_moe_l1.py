"""The L1 penalty of ReMoE, whose coefficient finds the sparsity that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import mean_scores
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": 122,
    "title": "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    "tags": ["needs_router:re_moe"],
}

# What is divided further would vanish, and never rise again.
_LEAST = 1e-30


@final
class ReMoeL1(Balancer):
    """Push ReLU routing weights to zero until each token has ``top_k`` experts, busier experts harder.

    The loss is ``lambda * sum_e f_e * P_e`` with ``P_e`` the mean weight of expert e over the tokens and
    ``f_e = E * n_e / (top_k * T)`` for the ``n_e`` of T tokens it is active for. After each step lambda,
    which starts at ``initial``, is multiplied by ``factor`` if on the mean over all layers more experts are
    active than asked for, and divided by it otherwise; it stays below ``most``. Gradients flow through
    ``P_e`` alone.

    Shapes:
        A routing of T tokens over E experts to one number; the state ``coefficient []`` is lambda, the same
        in every layer.

    Raises:
        SettingError: ``top_k`` is not in [1, 65536], ``initial`` not in [1e-30, 1e6], ``factor`` not in
            [1, 100], or ``most`` not in [``initial``, 1e6].

    Example:
        >>> balancer = ReMoeL1(top_k=1, initial=1e-8, factor=1.2)
        >>> begun = balancer.start(LayerShape(d_model=4, d_expert=8, num_experts=2))
        >>> from mixtura.types import Routing
        >>> ids, one = torch.tensor([0, 0]), torch.ones(1, dtype=torch.bool)
        >>> made = Routing.from_assignments(
        ...     torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2),
        ...     scores=torch.ones(1, 2), logits=torch.ones(1, 2), valid=one,
        ... )
        >>> f"{balancer.update(BalancerInput(routing=made, state=begun))['coefficient'].item():.2g}"
        '1.2e-08'

    Differences from the paper:
        ``top_k`` is 1 in the released runs. There nothing bounds lambda. Where tokens have mean zero no row
        can be negative for most of them, and lambda would grow until it is not finite; ``most`` ends that,
        and 1e-30 is the least. At exactly the target lambda is divided, as in the released code. A step
        without any token leaves it. Without ``loads`` the layer at hand stands for all. Padding counts
        nowhere.

    Reference:
        ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing (paper 122); repository
        thu-ml/ReMoE.
    """

    def __init__(
        self, *, top_k: int = 2, initial: float = 1e-8, factor: float = 1.2, most: float = 100.0
    ) -> None:
        check_range("ReMoeL1", "top_k", top_k, 1, 65536)
        check_range("ReMoeL1", "initial", initial, _LEAST, 1e6)
        check_range("ReMoeL1", "factor", factor, 1, 100)
        check_range("ReMoeL1", "most", most, initial, 1e6)
        self.most = most
        self.top_k = top_k
        self.initial = initial
        self.factor = factor

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        del shape
        return {"coefficient": torch.tensor(self.initial, dtype=torch.float32)}

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        likely = mean_scores(inputs.routing)
        share = inputs.demand.to(likely) / max(_num_tokens(inputs), 1)
        popular = inputs.routing.num_experts * share / self.top_k
        return inputs.state["coefficient"].to(likely) * (popular * likely).sum()

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        coefficient = inputs.state["coefficient"]
        num_tokens = _num_tokens(inputs)
        if num_tokens == 0:
            return {"coefficient": coefficient.clone()}
        loads = inputs.demand[None] if inputs.loads is None else inputs.loads
        active = float(loads.sum()) / (loads.shape[0] * num_tokens)
        scale = self.factor if active > self.top_k else 1 / self.factor
        return {"coefficient": (coefficient.detach() * scale).clamp(_LEAST, self.most)}


def _num_tokens(inputs: BalancerInput) -> int:
    return int(inputs.routing.valid.sum()) if inputs.num_tokens is None else inputs.num_tokens
