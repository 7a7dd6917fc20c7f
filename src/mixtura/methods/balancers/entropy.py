"""The entropy of routing: how sure the router is of its experts."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._scores import entropy, softmax
from mixtura.methods.balancers import Balancer
from mixtura.types import BalancerInput

METHOD = {
    "paper": 3,
    "title": "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    "tags": ["regularizer"],
}


@final
class Entropy(Balancer):
    """Make routers decide: ``coefficient`` times the mean entropy of the tokens' probabilities.

    The probabilities are a softmax of the logits, whatever scores the router made of them; the entropy,
    in nats, is between 0 (one expert certain) and ln E (all alike). Without it a top-p router comes to
    spread its probabilities over ever more experts. It does nothing for balance: pair it with a
    balancing loss. A negative coefficient asks for indecision instead.

    Shapes:
        A routing of T tokens over E experts to one number.

    Raises:
        SettingError: ``coefficient`` is not in [-1e6, 1e6].

    Example:
        >>> import torch
        >>> from mixtura.types import Routing
        >>> logits = torch.zeros(3, 4)
        >>> chosen, valid = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, dtype=torch.bool)
        >>> routing = Routing.from_choices(chosen, logits[:, :1], scores=logits, logits=logits, valid=valid)
        >>> round(Entropy(coefficient=1.0).loss(BalancerInput(routing=routing)).item(), 4)
        1.3863

    Differences from the paper:
        Its loss is a sum of ``-p log p`` over experts; it is averaged over tokens here. The authors'
        code, which is for inference, has no losses.

    Reference:
        Harder Tasks Need More Experts: Dynamic Routing in MoE Models (paper 3, abstract and summary).
    """

    def __init__(self, *, coefficient: float = 1e-4) -> None:
        check_range("Entropy", "coefficient", coefficient, -1e6, 1e6)
        self.coefficient = coefficient

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        routing = inputs.routing
        # Tokens first: what padding holds would spoil the gradient even where it is multiplied by 0.
        known = routing.logits[routing.valid]
        return self.coefficient * entropy(softmax(known)).sum() / max(known.shape[0], 1)
