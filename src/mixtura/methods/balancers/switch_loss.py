"""The Switch Transformer's load balancing loss."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._scores import crowding
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import load_shares, mean_scores
from mixtura.types import BalancerInput

METHOD = {
    "paper": 132,
    "title": "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    "tags": ["by_load"],
}


@final
class SwitchLoss(Balancer):
    """Penalise experts that get more tokens than others: ``coefficient * E * sum_e f_e * P_e``.

    ``f_e`` is the share of the assignments that expert ``e`` gets, ``P_e`` its mean score over the
    valid tokens. Balanced, the loss is ``coefficient``; with all tokens on one expert it nears
    ``coefficient * E``. Gradients flow through ``P_e`` alone.

    Shapes:
        A routing of T tokens over E experts to one number.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6].

    Example:
        >>> import torch
        >>> from mixtura.types import Routing
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        >>> chosen = torch.tensor([[0], [0]])
        >>> valid = torch.tensor([True, True])
        >>> routing = Routing.from_choices(chosen, scores[:, :1], scores=scores, logits=scores, valid=valid)
        >>> round(SwitchLoss(coefficient=1.0).loss(BalancerInput(routing=routing)).item(), 4)
        1.7

    Differences from the paper:
        With k experts a token, ``f_e`` is a share of all T * k assignments, so that the balanced
        value does not depend on k. Padding counts nowhere. There the counts are those of the tokens at
        hand, as they are here unless the counts of a larger batch are given as ``load``
        (`MixturaForCausalLM.count_ahead`, `mixtura.balance`): the mean of the parts' losses, weighted by
        their valid tokens, is then the loss of the whole, gradient included, and the same as that of
        `global_batch`, which asks for these counts always. What a capacity limit dropped is counted.

    Reference:
        Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity
        (paper 132); ``load_balancing_loss_func`` in transformers 5.23. Counts of the whole batch:
        Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
        Mixture-of-Expert Models (paper 163, abstract).
    """

    def __init__(self, *, coefficient: float = 0.01) -> None:
        check_range("SwitchLoss", "coefficient", coefficient, 0, 1e6)
        self.coefficient = coefficient

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        return self.coefficient * crowding(load_shares(inputs), mean_scores(inputs.routing))
