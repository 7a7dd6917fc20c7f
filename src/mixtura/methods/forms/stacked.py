"""Finedeep: a feed-forward part cut into several sub-layers of experts, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods._norms import RMSNorm
from mixtura.methods.forms import Form, Pass
from mixtura.types import LayerShape

METHOD = {
    "paper": 53,
    "title": "Finedeep: Mitigating Sparse Activation in Dense LLMs via Multi-Layer Fine-Grained Experts",
    "tags": [],
}


@final
class Stacked(Form):
    """Make a layer of ``depth`` sub-layers, each of own experts, router, norm and residual.

    ``h <- h + MoE_i(norm_i(h))``, beginning with the token. Sizes are those of one sub-layer: a dense part of
    width F becomes M sub-layers of K experts of width ``F / (M K)``. With the mixer ``output_sigmoid`` all
    experts run and each is weighted by a sigmoid of its own output, as in the paper; any router will do.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; D parameters for the norm of each sub-layer after the first, which has the
        block's.

    Raises:
        SettingError: ``depth`` is not in [1, 64].

    Example:
        >>> form = Stacked(LayerShape(d_model=4, d_expert=8, num_experts=3), depth=3)
        >>> form.num_passes, sum(one.numel() for one in form.parameters())
        (3, 8)

    Differences from the paper:
        Only a summary of the paper was at hand. The norm before the first sub-layer is the decoder block's.

    Reference:
        Finedeep: Mitigating Sparse Activation in Dense LLMs via Multi-Layer Fine-Grained Experts (paper 53,
        abstract and a summary).
    """

    def __init__(self, shape: LayerShape, *, depth: int = 2) -> None:
        super().__init__(shape)
        self.depth = self.within("depth", depth, 1, 64)
        self.norms = nn.ModuleList(RMSNorm(shape.d_model) for _ in range(depth - 1))

    @property
    def num_passes(self) -> int:
        """One a sub-layer."""
        return self.depth

    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        added = torch.zeros_like(x)
        for turn, one in enumerate(passes):
            added = added + one(x if turn == 0 else self.norms[turn - 1](residual + added))
        return added
