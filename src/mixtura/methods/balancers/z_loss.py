"""The router z-loss: keep logits small."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._precision import exact
from mixtura.methods.balancers import Balancer
from mixtura.types import BalancerInput

METHOD = {
    "paper": None,
    "title": "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    "tags": ["regularizer"],
}


@final
class ZLoss(Balancer):
    """Penalise large router logits: ``coefficient`` times the mean squared log of their summed exponents.

    Small logits keep softmax away from where rounding hurts, which makes training in bfloat16 stable.
    It does not even out the load; use it beside a balancer that does.

    Shapes:
        Logits ``[T, E]`` to one number: the mean over valid tokens of ``logsumexp(logits) ** 2``.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6].

    Example:
        >>> import torch
        >>> from mixtura.types import Routing
        >>> logits = torch.zeros(2, 4)
        >>> chosen, valid = torch.tensor([[0], [1]]), torch.tensor([True, True])
        >>> ones = torch.ones(2, 1)
        >>> routing = Routing.from_choices(chosen, ones, scores=logits, logits=logits, valid=valid)
        >>> round(ZLoss(coefficient=1.0).loss(BalancerInput(routing=routing)).item(), 4)
        1.9218

    Differences from the paper:
        None in the formula; padding is left out of the mean.

    Reference:
        ST-MoE: Designing Stable and Transferable Sparse Expert Models.
    """

    def __init__(self, *, coefficient: float = 0.001) -> None:
        check_range("ZLoss", "coefficient", coefficient, 0, 1e6)
        self.coefficient = coefficient

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        routing = inputs.routing
        # Tokens first: what padding holds would spoil the gradient even where it is multiplied by 0.
        known = exact(routing.logits[routing.valid])
        return self.coefficient * known.logsumexp(-1).square().sum() / max(known.shape[0], 1)
