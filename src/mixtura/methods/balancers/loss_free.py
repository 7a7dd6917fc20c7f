"""Loss-free balancing: a bias on each expert's score that follows its load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import lack
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": 112,
    "title": "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
}


@final
class LossFree(Balancer):
    """Raise the selection bias of experts that got too few tokens, lower that of those with too many.

    After every optimizer step each expert's bias moves by ``rate`` towards balance: with
    ``rule="sign"`` by ``rate`` exactly, with ``rule="error"`` by ``rate`` times what the expert lacks,
    as a share of the mean load. The bias is added to scores when choosing and never to weights, and it
    carries no gradient, so training for the task is not disturbed. With ``centered`` the biases are
    shifted to a mean of 0, which changes no choice and keeps them from drifting together.

    Shapes:
        State ``bias [E]``, in float32 whatever the model's dtype: steps of 0.001 vanish in bfloat16.

    Raises:
        SettingError: ``rate`` is not in [0, 100], or ``rule`` is unknown.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> routing = sample_routing(hot=4.0)
        >>> balancer = LossFree(rate=0.001)
        >>> state = balancer.start(LayerShape(d_model=4, d_expert=4, num_experts=8))
        >>> balancer.update(BalancerInput(routing=routing, state=state))["bias"][:3]
        tensor([-0.0010,  0.0010,  0.0010])

    Differences from the paper:
        Under ``rule="error"`` the error is a share of the mean load, so that ``rate`` means the same
        for every batch size. A bias that multiplies scores, which the paper also tries, is left out:
        the router's ``selection_bias`` is added. ``centered`` is not in the paper.

    Reference:
        Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts (paper 112, abstract).
    """

    def __init__(
        self, *, rate: float = 0.001, rule: Literal["sign", "error"] = "sign", centered: bool = False
    ) -> None:
        check_range("LossFree", "rate", rate, 0, 100)
        self.rate = rate
        self.rule = rule
        self.centered = centered

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        return {"bias": torch.zeros(shape.num_experts, dtype=torch.float32)}

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        missing = lack(inputs)
        step = missing.sign() if self.rule == "sign" else missing
        bias = inputs.state["bias"] + self.rate * step
        return {"bias": bias - bias.mean() if self.centered else bias}
