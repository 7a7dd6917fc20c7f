"""Latent experts: groups of experts read a token through one narrow matrix."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods._activations import swiglu
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices, grouped
from mixtura.types import LayerShape, Matrices, Ran, Rows

METHOD = {
    "paper": 25,
    "title": "Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models",
    "tags": ["materialises", "token_independent"],
}


@final
class Latent(Bank):
    """Gated experts whose reading matrices share a projection into ``width`` latent features.

    The experts of each of ``num_groups`` groups share ``B [m, D]``, one for the gates and one for what they
    multiply; expert e has its own ``A_e [F, m]`` for each and its own ``down``: it computes
    ``down_e (silu(A_e^g B^g x) * (A_e^u B^u x))``. A token is projected once a group, whatever experts it
    goes to. ``width=0`` takes half of the model's. Multiplied out, the experts are ordinary matrices.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``latent_proj [G, 2m, D]``, ``gate_up_latent [E, 2F, m]`` and
        ``down_proj [E, D, F]``: 2 G m D + 2 E F m + E F D numbers.

    Raises:
        SettingError: ``width`` is not in [0, 1e8], or ``num_groups`` does not divide the experts.

    Example:
        >>> bank = Latent(LayerShape(d_model=4, d_expert=8, num_experts=6), width=2, num_groups=2)
        >>> bank.matrices().gate_up.shape, sum(one.numel() for one in bank.parameters())
        (torch.Size([6, 16, 4]), 416)

    Differences from the paper:
        Only the abstract and a reproduction were at hand. The writing matrices are each expert's own, as in
        its first version; sharing them, too, is left out. Trained models are converted by `mixtura factor`,
        in one step: rounding each expert to a low rank first, as there, could only lose more. Products of the
        two factors begin with the variance that an expert's matrix has.

    Reference:
        Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models (paper 25,
        abstract and a reproduction).
    """

    def __init__(self, shape: LayerShape, *, width: int = 0, num_groups: int = 1, seed: int = 0) -> None:
        super().__init__(shape)
        self.width = self.within("width", width, 0, 100_000_000)
        self.num_groups = self.within("num_groups", num_groups, 1, shape.num_experts)
        if shape.num_experts % num_groups:
            raise SettingError(
                f"num_groups of Latent must divide the {shape.num_experts} experts, got {num_groups}"
            )
        self.seed = seed
        latent = width or max(shape.d_model // 2, 1)
        generator = begun(seed)
        self.latent_proj = drawn_matrices(generator, num_groups, 2 * latent, shape.d_model)
        self.gate_up_latent = drawn_matrices(generator, shape.num_experts, 2 * shape.d_expert, latent)
        self.down_proj = drawn_matrices(generator, shape.num_experts, shape.d_model, shape.d_expert)

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        # The product of the two factors has a variance of one over D, as a matrix of its own would.
        self.gate_up_latent.mul_(deviation * self.shape.d_model**0.5)
        self.down_proj.mul_(deviation * self.shape.d_expert**0.5)

    def matrices(self) -> Matrices:
        shared = self.latent_proj.repeat_interleave(self.shape.num_experts // self.num_groups, dim=0)
        parts = zip(self.gate_up_latent.chunk(2, dim=1), shared.chunk(2, dim=1), strict=True)
        return Matrices(torch.cat([own @ common for own, common in parts], dim=1), self.down_proj, swiglu)

    def run(self, rows: Rows) -> Ran:
        latent: Float[Tensor, "T G M2"] = F.linear(rows.x, self.latent_proj.flatten(0, 1)).view(
            rows.x.shape[0], self.num_groups, self.latent_proj.shape[1]
        )
        group = rows.expert_ids // (self.shape.num_experts // self.num_groups)
        parts = zip(
            latent[rows.token_ids, group].chunk(2, dim=-1), self.gate_up_latent.chunk(2, dim=1), strict=True
        )
        features = torch.cat([grouped(read, own, rows.offsets) for read, own in parts], dim=-1)
        return Ran(grouped(swiglu(features), self.down_proj, rows.offsets))
