"""The importance loss: every expert's summed weight should be the same."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._precision import exact
from mixtura.methods._scores import squared_variation
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import mean_scores
from mixtura.types import BalancerInput

METHOD = {
    "paper": None,
    "title": "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    "tags": ["whole_batch"],
}


@final
class Importance(Balancer):
    """Penalise unequal importance: the squared coefficient of variation of the experts' summed weights.

    An expert's importance is the sum over the batch of the weights it is given (``of="weights"``), or
    of its scores, chosen or not (``of="scores"``, as vision models do). Equal importance does not
    mean equal load: one expert may get few tokens with large weights.

    Shapes:
        A routing of T tokens over E experts to one number.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6], or ``of`` is unknown.

    Example:
        >>> import torch
        >>> from mixtura.types import Routing
        >>> chosen, weights = torch.tensor([[0], [0], [1]]), torch.tensor([[0.5], [1.0], [0.5]])
        >>> scores, valid = torch.zeros(3, 2), torch.tensor([True, True, True])
        >>> routing = Routing.from_choices(chosen, weights, scores=scores, logits=scores, valid=valid)
        >>> Importance(coefficient=1.0).loss(BalancerInput(routing=routing)).item()
        0.25

    Differences from the paper:
        None in the formula. The paper's second loss, on the number of tokens that noise would send to
        each expert, needs the noise and is part of the router `noisy_top_k`.

    Reference:
        Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer.
    """

    def __init__(self, *, coefficient: float = 0.1, of: Literal["weights", "scores"] = "weights") -> None:
        check_range("Importance", "coefficient", coefficient, 0, 1e6)
        self.coefficient = coefficient
        self.of = of

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        routing = inputs.routing
        if self.of == "scores":
            return self.coefficient * squared_variation(mean_scores(routing))
        weights = exact(routing.weights)
        summed = weights.new_zeros(routing.num_experts).index_add(0, routing.expert_ids, weights)
        return self.coefficient * squared_variation(summed)
