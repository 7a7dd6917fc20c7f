"""The expert-router coupling loss: an expert answers its own router row most strongly."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import uniform_like
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import needed
from mixtura.types import BalancerInput

METHOD = {
    "paper": 101,
    "title": "Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss",
    "tags": ["regularizer", "reads:generator", "reads:experts", "reads:router_weight"],
}


@final
class ErcLoss(Balancer):
    """Couple experts and router: each expert responds most to its own router row, and each row to it.

    A router row stands for the tokens sent to its expert. Row ``i``, each entry multiplied by noise
    within ``1 - eps_i .. 1 + eps_i``, goes through the gate matrix of every expert ``j``; ``M[i, j]``
    is the norm of the result. The loss is ``coefficient / E**2`` times the sum over ``i != j`` of how
    far ``M[i, j]`` and ``M[j, i]`` exceed ``alpha * M[i, i]``. ``eps_i`` is half the distance to the
    nearest other row over the row's norm, so that a noisy row stays nearest to its own. The cost does not
    depend on the number of tokens. It does not even out the load; use it beside a balancer that does.

    Shapes:
        Router rows ``[E, D]`` and gate matrices ``[E, F, D]`` (up matrices of experts without a gate) to
        one number.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6], or ``alpha`` not in [0, 1e3].
        UserError: experts or router rows were not given.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> from mixtura.modeling.layer import ExpertMatrices
        >>> rows = torch.eye(2)
        >>> own = torch.stack([torch.diag(row) for row in rows])  # expert e reads entry e alone
        >>> def cost(gate):
        ...     experts = ExpertMatrices(torch.cat([gate, gate], dim=1), gate)
        ...     inputs = BalancerInput(routing=sample_routing(), experts=experts, router_weight=rows)
        ...     return ErcLoss().loss(inputs).item()
        >>> cost(own), cost(own.flip(0))
        (0.0, 1.0)

    Differences from the paper:
        Without a generator rows are not perturbed. Written from the formulas; noise is drawn anew for
        each entry, and is the same in all parts of a step. The rows are those of a router tagged
        ``expert_rows`` or ``keeps_weights``; with one that scores experts otherwise it is refused.

    Reference:
        Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss (paper 101).
    """

    def __init__(self, *, coefficient: float = 1.0, alpha: float = 1.0) -> None:
        check_range("ErcLoss", "coefficient", coefficient, 0, 1e6)
        check_range("ErcLoss", "alpha", alpha, 0, 1e3)
        self.coefficient = coefficient
        self.alpha = alpha

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        experts = needed(inputs, "experts", "ErcLoss")
        rows = exact(needed(inputs, "router_weight", "ErcLoss"))
        matrices = exact(experts.up if experts.gate is None else experts.gate)
        with full_precision():
            answers = torch.einsum("efd,id->ief", matrices, self._perturbed(rows, inputs.generator))
        strength = torch.linalg.vector_norm(answers, dim=-1)
        own = self.alpha * strength.diagonal()[:, None]
        excess = F.relu(strength - own) + F.relu(strength.T - own)
        others = ~torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
        return self.coefficient * torch.where(others, excess, 0.0).sum() / rows.shape[0] ** 2

    @staticmethod
    def _perturbed(rows: Float[Tensor, "E D"], generator: torch.Generator | None) -> Float[Tensor, "E D"]:
        if generator is None or rows.shape[0] < 2:
            return rows
        fixed = rows.detach()
        itself = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
        nearest = torch.cdist(fixed, fixed).masked_fill(itself, torch.inf).min(-1).values
        length = fixed.norm(dim=-1)
        # A row of zeros is moved by no factor, however large.
        bound = torch.where(length > 0, nearest / (2 * length), 0.0)
        noise = 2 * uniform_like(fixed, generator) - 1
        factor: Tensor = 1 + bound[:, None] * noise
        return rows * factor
