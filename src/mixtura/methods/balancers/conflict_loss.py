"""The lagged gradient game: experts whose gradients conflict should come apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.balancers import Balancer
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
    ``tie(i, j) * relu(-cosine(g_i, g_j))``, with ``g_i`` the gradient of the expert's matrices that read a
    token. The cosine is over the entries in which both gradients are not 0. With ``ties="topology"`` a tie
    is ``alpha[i, j]`` of a matrix that is trained with the model; ties below 0.001 cost nothing. A layer of
    our own weighs experts by it: the weight of expert ``i`` for a token is multiplied by the mean of
    ``sigmoid(alpha[i, j])`` over the token's experts ``j``, itself among them. So the task strengthens ties
    that serve it, this loss weakens those of experts in conflict. With ``ties="scores"``, for any model, a
    tie is how much tokens are sent to both: the mean over tokens of the product of their scores, so that
    the router learns not to mix experts that conflict.

    Shapes:
        Each expert's flattened gradient ``[E, P]`` to one number; state ``alpha [E, E]``.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6], or ``ties`` is unknown.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> gradients = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.0]]).repeat(4, 1)
        >>> balancer = ConflictLoss(coefficient=1.0)
        >>> state = balancer.start(LayerShape(d_model=4, d_expert=4, num_experts=8))
        >>> inputs = BalancerInput(routing=sample_routing(), state=state, gradients=gradients)
        >>> round(balancer.loss(inputs).item(), 2)  # 32 pairs in full conflict where they overlap
        3.2

    Differences from the paper:
        There experts are slices of one matrix, and ``alpha`` says whose columns each of them borrows; an
        expert's output is multiplied by the mean strength of its ties. Here experts own their matrices, so
        that ties say how far experts that meet at a token count together, and gradients are compared entry
        by entry of matrices of one shape. That only layers of our own read ``alpha`` makes ``"topology"``
        refused elsewhere; ``"scores"`` is ours. As in the authors' code ties count as they are, not by
        their sigmoid, as the paper has it, and the loss is weighted by 10, which there weighs two small
        penalties on ``alpha`` as well; these, the small noise at its start, and the learning rate of its own
        are left out. The authors' reward for agreeing gradients is computed but unused there. Gradients are
        the step's, of all tokens and processes, where theirs are of the last of a token's choices. They are
        not saved: the first step after loading has none, and a gradient that is not finite counts as none.

    Reference:
        Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for Emergent
        Modularity (paper 26); the authors' code.
    """

    def __init__(
        self, *, coefficient: float = 10.0, ties: Literal["topology", "scores"] = "topology"
    ) -> None:
        check_range("ConflictLoss", "coefficient", coefficient, 0, 1e6)
        self.coefficient = coefficient
        self.ties = ties

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        if self.ties == "scores":
            return {}
        size = (shape.num_experts, shape.num_experts)
        alpha = torch.full(size, 0.1, dtype=torch.float32).fill_diagonal_(1.0)
        return {"alpha": alpha.requires_grad_()}

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        # In the graph from the first step on, when there are no gradients yet: processes that train
        # together wait for every parameter.
        ties = self._tied(inputs)
        if inputs.gradients is None:
            return 0.0 * ties.sum()
        used = inputs.demand > 0
        pairs = used[:, None] & used & ~torch.eye(len(used), dtype=torch.bool, device=used.device)
        conflict = F.relu(-_overlap_cosines(exact(inputs.gradients.detach()).to(ties)))
        return self.coefficient * torch.where(pairs, ties * conflict, 0.0).sum()

    def _tied(self, inputs: BalancerInput) -> Float[Tensor, "E E"]:
        if self.ties == "topology":
            alpha = inputs.state["alpha"]
            return torch.where(alpha >= _WEAK, alpha, 0.0)
        routing = inputs.routing
        scores = torch.where(routing.valid[:, None], routing.scores, 0.0)
        with full_precision():
            return scores.T @ scores / routing.valid.sum().clamp(min=1)


def _overlap_cosines(gradients: Float[Tensor, "E P"]) -> Float[Tensor, "E E"]:
    """The cosine of every two gradients over the entries in which neither is 0; 0 where there are none."""
    known = torch.where(gradients.isfinite().all(-1, keepdim=True), gradients, 0.0)
    # To a size at which squares neither vanish nor overflow.
    largest = known.abs().amax(-1, keepdim=True) if known.shape[1] else known.sum(-1, keepdim=True)
    known = known / torch.where(largest > 0, largest, 1.0)
    with full_precision():
        norms = (known.square() @ (known != 0).to(known).T).sqrt()
        return known @ known.T / (norms * norms.T).clamp(min=torch.finfo(known.dtype).tiny)
