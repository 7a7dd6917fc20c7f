"""CDSP-MoE's experts: overlapping slices of one pair of matrices, chosen by a learnt topology."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods._drawing import normal, orthogonal
from mixtura.methods._precision import exact
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun
from mixtura.types import LayerShape, Matrices

METHOD = {
    "paper": 26,
    "title": "Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for Emergent "
    "Modularity",
    "tags": ["materialises", "token_independent"],
}
_TIE, _NOISE = 0.1, 0.02


@final
class Subspace(Bank):
    """Experts that are slices of one base: expert e has the ``d_expert`` columns that it is tied to most.

    A base of B columns is dealt to the experts in equal blocks. ``alpha [E, E]`` is trained and says how much
    each expert borrows of each other's block; expert e takes the F columns of highest ``sigmoid(alpha_e)``,
    its own first, and computes ``s_e V silu(U x)`` with these rows of ``U`` and columns of ``V``, where
    ``s_e`` is the mean strength of its columns: so the task strengthens ties that serve it. Losses keep ties
    few and certain: ``coefficient * (1e-4 mean|alpha| + 1e-3 mean s (1 - s))`` with ``s = sigmoid(alpha)``.
    ``columns=0`` makes a base of ``F sqrt(E)`` columns, rounded up to blocks.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``base_up [B, D]``, ``base_down [B, D]`` and ``alpha [E, E]``:
        2 B D + E^2 numbers.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6], ``columns`` not in [0, 1e8], no multiple of the
            experts, or fewer than ``d_expert``; or ``d_expert`` is less than a block.

    Example:
        >>> bank = Subspace(LayerShape(d_model=4, d_expert=3, num_experts=4), columns=8)
        >>> bank.chosen().tolist()[1][:2]  # its own block comes first
        [2, 3]

    Differences from the paper:
        The loss on ties between experts whose gradients conflict is left out here: the balancer
        ``conflict_loss`` has one, for experts with matrices of their own. In the authors' code the number of
        columns of an expert follows from the base, here the base from the expert; ``alpha`` has a learning
        rate of its own there. Their router is a top-k of a layer norm with a task's embedding; here it is
        any. The base is drawn orthogonal, as theirs is, with the size that the model's matrices have.

    Reference:
        Mixture-of-Experts with Gradient Conflict-Driven Subspace Topology Pruning for Emergent Modularity
        (paper 26); the authors' code, ``models/layer.py`` and ``core/topology.py``.
    """

    def __init__(
        self, shape: LayerShape, *, columns: int = 0, coefficient: float = 10.0, seed: int = 0
    ) -> None:
        super().__init__(shape)
        self.columns = self.within("columns", columns, 0, 100_000_000)
        self.coefficient = self.within("coefficient", coefficient, 0, 1e6)
        self.seed = seed
        count, wanted = shape.num_experts, shape.d_expert
        base = columns or count * ceil(wanted * sqrt(count) / count)
        if base % count or base < wanted or base // count > wanted:
            raise SettingError(
                f"columns of Subspace must be a multiple of the {count} experts, {wanted} or more, at most "
                f"{wanted} an expert, got {base}"
            )
        self.base_up = orthogonal(base, shape.d_model, seed, gain=1.0)
        self.base_down = orthogonal(base, shape.d_model, seed + 1, gain=1.0)
        generator = begun(seed + 2)
        ties = normal(generator, count, count)
        self.alpha = nn.Parameter((_TIE + _NOISE * ties).fill_diagonal_(1.0))

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        for base in (self.base_up, self.base_down):
            base.mul_(deviation * max(base.shape) ** 0.5)

    def num_used(self, num_chosen: float) -> float:
        # Slices overlap; each chosen one is multiplied with.
        return 2 * num_chosen * self.shape.d_expert * self.shape.d_model + self.alpha.numel()

    def strengths(self) -> Float[Tensor, "E B"]:
        """How much each expert is tied to each column of the base."""
        return exact(self.alpha).sigmoid().repeat_interleave(self.base_up.shape[0] // len(self.alpha), dim=1)

    def chosen(self) -> Int[Tensor, "E F"]:
        """The columns of each expert, the most tied first; of equal ones those of lowest number."""
        order = torch.sort(self.strengths().detach(), dim=-1, descending=True, stable=True)
        return order.indices[:, : self.shape.d_expert]

    def matrices(self) -> Matrices:
        columns = self.chosen()
        strength = self.strengths().gather(1, columns).mean(-1)
        down = strength[:, None, None].to(self.base_down) * self.base_down[columns].transpose(1, 2)
        return Matrices(self.base_up[columns], down, F.silu, gated=False)

    def losses(self) -> Mapping[str, Float[Tensor, ""]]:
        ties = exact(self.alpha)
        shares = ties.sigmoid()
        few = 1e-4 * ties.abs().mean()
        return {"topology": self.coefficient * (few + 1e-3 * (shares * (1 - shares)).mean())}
