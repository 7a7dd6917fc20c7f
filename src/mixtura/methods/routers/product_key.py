"""OmniMoE's router: the best of very many experts, found among rows and columns of a grid."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods.routers import Router
from mixtura.methods.routers._grids import axes_of, axis, standardised
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 62,
    "title": "OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale",
    "tags": ["token_independent", "axes"],
}


@final
class ProductKey(Router):
    """Lay E experts on a grid of rows and columns, and choose the ``top_k`` best by row and column scores.

    An expert's score is the log-probability of its row plus that of its column, so a token compares R + C
    numbers, not E: the best ``top_k`` of the grid are among the best ``top_k`` rows and columns. Weights are
    the products of the two probabilities and are not made to sum to 1. With ``normalize`` a token's logits
    of either axis are standardised first. The grid is as square as E allows; balancers see rows and columns.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments, ``scores [T, R + C]``; parameters ``row_weight [R, D]`` and
        ``column_weight [C, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E].

    Example:
        >>> router = ProductKey(LayerShape(d_model=4, d_expert=1, num_experts=10_000), top_k=3)
        >>> routing = router(RouterInput.of(torch.eye(4)))
        >>> routing.num_experts, routing.scores.shape, routing.load.sum().item()
        (10000, torch.Size([4, 200]), 12)

    Differences from the paper:
        There logits are standardised by a batch norm, over the tokens of the batch, later ones too, and in
        evaluation by running means; here over the rows or the columns of each token alone, so that a token's
        experts depend on it alone. Rows and columns are evened out by balancers instead. E need not be a
        square; in the authors' code experts beyond the largest square are never chosen.

    Reference:
        OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale (paper 62); repository
        flash-algo/omni-moe.
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2, normalize: bool = True, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.normalize = normalize
        self.seed = seed
        rows, columns = self.axes
        self.row_weight = drawn(seed, rows.num_experts, shape.d_model)
        self.column_weight = drawn(seed + 1, columns.num_experts, shape.d_model)

    @property
    def axes(self) -> tuple[LayerShape, ...]:
        return axes_of(self.shape)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = [exact_logits(inputs.x, weight) for weight in (self.row_weight, self.column_weight)]
        if self.normalize:
            logits = [standardised(one) for one in logits]
        logs = [one.log_softmax(-1) for one in logits]
        kept = [best(one, min(self.top_k, one.shape[1])) for one in logs]
        pairs = logs[0].gather(1, kept[0])[:, :, None] + logs[1].gather(1, kept[1])[:, None]
        place = best(pairs.flatten(1), self.top_k)
        row, column = (
            kept[0].gather(1, place // kept[1].shape[1]),
            kept[1].gather(1, place % kept[1].shape[1]),
        )
        weights = pairs.flatten(1).gather(1, place).exp()
        count = logits[1].shape[1]
        parts = [
            self._axis(ids, weights, one, log, inputs)
            for ids, one, log in zip((row, column), logits, logs, strict=True)
        ]
        both = [torch.cat([getattr(part, name) for part in parts], 1) for name in ("scores", "logits")]
        token_ids = torch.arange(len(row), device=row.device)[:, None].expand_as(row)
        chosen = Routing.from_assignments(
            token_ids.flatten(),
            (row * count + column).flatten(),
            weights.flatten().to(inputs.x.dtype),
            scores=both[0],
            logits=both[1],
            valid=inputs.valid,
        )
        return replace(chosen, axes=tuple(parts))

    def _axis(
        self, ids: Tensor, weights: Tensor, logits: Tensor, logs: Tensor, inputs: RouterInput
    ) -> Routing:
        summed = torch.zeros_like(logits).scatter_add(1, ids, weights)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
        return axis(summed, chosen, logs.exp(), logits, inputs.valid)
