"""Monet's router: several heads give weights to rows and to columns of a grid of experts."""

from __future__ import annotations

from statistics import NormalDist
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods.routers import Router
from mixtura.methods.routers._grids import axes_of, axis, standardised
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 192,
    "title": "Monet: Mixture of Monosemantic Experts for Transformers",
    "tags": ["token_independent", "axes", "gates", "shared", "stateful", "reads:layer", "reads:state"],
}


@final
class Monet(Router):
    """Weigh the rows and the columns of a grid of experts, in ``num_heads`` heads, without choosing experts.

    Each head makes logits for the R rows and the C columns. Those that stand out pass: a logit, standardised
    over the head's rows (columns), of at least the point that a share ``per_head / R`` of a normal
    distribution exceeds; the highest always does. A softmax over those that pass gives the gates ``g1`` and
    ``g2``, and expert (i, j) has the weight ``sum_h g1[h, i] * g2[h, j]``. Experts ``product`` compute the
    sum of all R * C of them without forming one. Layers go in groups of ``num_shared``, whose first decides
    for all: the gates are handed on as state. One instance stands in all ``num_layers`` MoE layers of a
    model.

    Shapes:
        ``x [T, D]`` to gates ``[T, H, R]`` and ``[T, H, C]``, ``state [T, H * (R + C)]``, ``scores [T, R +
        C]``; parameters ``row_weight [G, H * R, D]`` and ``column_weight [G, H * C, D]`` for G groups.

    Raises:
        SettingError: ``per_head`` is not in [1, 1e5], ``num_heads``, ``num_shared`` or ``num_layers`` not in
            [1, 1e4].
        UserError: the layer's number is not below ``num_layers``, or the state is not of the layer before.

    Example:
        >>> router = Monet(LayerShape(d_model=4, d_expert=8, num_experts=10_000), num_heads=2)
        >>> rows, columns = router(RouterInput.of(torch.eye(4))).gates
        >>> rows.shape, bool(torch.allclose(rows.sum(-1), torch.ones(()))), int((rows > 0).sum(-1).max()) < 60
        (torch.Size([4, 2, 100]), True, True)

    Differences from the paper:
        There logits are standardised by a batch norm over the batch's tokens and a head's rows, and in
        evaluation by running values; here over the rows of each token and head alone, so that a token's gates
        depend on it alone. The paper's losses for uniformity and ambiguity, absent from the authors' file for
        inference, are left to balancers, which see rows and columns; scores are the heads' mean.

    Reference:
        Monet: Mixture of Monosemantic Experts for Transformers (paper 192); repository dmis-lab/Monet.
    """

    choice_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        shape: LayerShape,
        *,
        per_head: int = 32,
        num_heads: int = 8,
        num_shared: int = 4,
        num_layers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.per_head = self.within("per_head", per_head, 1, 100_000)
        self.num_heads = self.within("num_heads", num_heads, 1, 10_000)
        self.num_shared = self.within("num_shared", num_shared, 1, 10_000)
        self.num_layers = self.within("num_layers", num_layers, 1, 10_000)
        self.seed = seed
        rows, columns = (num_heads * one.num_experts for one in self.axes)
        groups = -(-num_layers // num_shared)
        self.row_weight = drawn(seed, groups, rows, shape.d_model)
        self.column_weight = drawn(seed + 1, groups, columns, shape.d_model)

    @property
    def axes(self) -> tuple[LayerShape, ...]:
        return axes_of(self.shape)

    def forward(self, inputs: RouterInput) -> Routing:
        if inputs.layer >= self.num_layers:
            raise UserError(
                f"Monet is made for {self.num_layers} layers, got layer {inputs.layer}, counted from 0; give "
                "it num_layers=, the number of MoE layers"
            )
        counts = [self.num_heads * one.num_experts for one in self.axes]
        state = self.handed(inputs, sum(counts), "logits")
        if state is None or inputs.layer % self.num_shared == 0:
            group = inputs.layer // self.num_shared
            weights = (self.row_weight[group], self.column_weight[group])
            state = torch.cat([exact_logits(inputs.x, weight) for weight in weights], dim=-1)
        logits = [one.unflatten(1, (self.num_heads, -1)) for one in state.split(counts, dim=-1)]
        gates = [self._gates(one) for one in logits]
        parts = [
            axis(gate.mean(1), (gate > 0).any(1), one.softmax(-1).mean(1), one.mean(1), inputs.valid)
            for gate, one in zip(gates, logits, strict=True)
        ]
        none = torch.zeros(0, dtype=torch.long, device=state.device)
        return Routing(
            token_ids=none,
            expert_ids=none,
            weights=inputs.x.new_zeros(0),
            scores=torch.cat([part.scores for part in parts], dim=1),
            logits=torch.cat([part.logits for part in parts], dim=1),
            valid=inputs.valid,
            state=state,
            axes=tuple(parts),
            gates=(gates[0].to(inputs.x.dtype), gates[1].to(inputs.x.dtype)),
        )

    def _gates(self, logits: Float[Tensor, "T H R"]) -> Float[Tensor, "T H R"]:
        """A softmax over the logits that stand out."""
        share = min(self.per_head / logits.shape[-1], 1 - 1e-6)
        height = standardised(logits.detach())
        least = height.amax(-1, keepdim=True).clamp(max=NormalDist().inv_cdf(1 - share))
        return logits.masked_fill(height < least, -torch.inf).softmax(-1)
