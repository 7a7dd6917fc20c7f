"""The lagged gradient game: experts whose gradients conflict should come apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods.balancers import Balancer
from mixtura.methods.routers._shared import exact
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": 26,
    "title": "Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for Emergent "
    "Modularity",
    "tags": ["regularizer", "reads:gradients"],
}
_WEAK = 1e-3


@final
class ConflictLoss(Balancer):
    """Penalise ties between experts whose gradients of the step before pointed against each other.

    The loss is ``coefficient`` times the sum over pairs ``i != j`` of experts that both got tokens of
    ``tie(i, j) * relu(-cosine(g_i, g_j))``. The cosine is over the entries in which both gradients are
    not 0: the part of a shared space that both experts use. With ``ties="topology"`` a tie is
    ``sigmoid(alpha[i, j])`` of a matrix ``alpha`` that is trained with the model and that experts on a
    shared space read as their topology; ties below 0.001 are left out. With ``ties="scores"``, for
    experts of their own, it is how much tokens are sent to both: the mean over tokens of the product of
    their scores, so that the router learns not to mix experts that conflict.

    Shapes:
        Each expert's flattened gradient ``[E, P]`` to one number; state ``alpha [E, E]``.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6], or ``ties`` is unknown.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> gradients = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.0]]).repeat(4, 1)
        >>> balancer = ConflictLoss()
        >>> state = balancer.start(LayerShape(d_model=4, d_expert=4, num_experts=8))
        >>> inputs = BalancerInput(routing=sample_routing(), state=state, gradients=gradients)
        >>> round(balancer.loss(inputs).item(), 2)  # 32 pairs in full conflict where they overlap
        16.8

    Differences from the paper:
        ``alpha`` starts at 1 on its diagonal and at 0.1 elsewhere, without the small noise of the
        authors' code. ``ties="scores"`` is ours. The authors' reward for agreeing gradients is
        computed but unused there and is left out here.

    Reference:
        Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for Emergent
        Modularity (paper 26); the authors' code.
    """

    def __init__(self, *, coefficient: float = 1.0, ties: Literal["topology", "scores"] = "topology") -> None:
        check_range("ConflictLoss", "coefficient", coefficient, 0, 1e6)
        self.coefficient = coefficient
        self.ties = ties

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        if self.ties == "scores":
            return {}
        alpha = torch.full((shape.num_experts, shape.num_experts), 0.1).fill_diagonal_(1.0)
        return {"alpha": alpha.requires_grad_()}

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        routing = inputs.routing
        if inputs.gradients is None:
            return routing.scores.new_zeros(())
        used = inputs.demand > 0
        pairs = used[:, None] & used & ~torch.eye(len(used), dtype=torch.bool, device=used.device)
        conflict = F.relu(-_overlap_cosines(exact(inputs.gradients.detach())))
        return self.coefficient * torch.where(pairs, self._tied(inputs) * conflict, 0.0).sum()

    def _tied(self, inputs: BalancerInput) -> Float[Tensor, "E E"]:
        if self.ties == "topology":
            ties = inputs.state["alpha"].sigmoid()
            return torch.where(ties >= _WEAK, ties, 0.0)
        routing = inputs.routing
        scores = torch.where(routing.valid[:, None], routing.scores, 0.0)
        return scores.T @ scores / routing.valid.sum().clamp(min=1)


def _overlap_cosines(gradients: Float[Tensor, "E P"]) -> Float[Tensor, "E E"]:
    """The cosine of every two gradients over the entries in which neither is 0; 0 where there are none."""
    norms = (gradients.square() @ (gradients != 0).to(gradients).T).sqrt()
    return gradients @ gradients.T / (norms * norms.T).clamp(min=torch.finfo(gradients.dtype).tiny)
