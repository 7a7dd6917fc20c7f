"""Residual MoE: a dense branch beside the experts, and a learnt share of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import drawn
from mixtura.methods.forms import Form, Pass
from mixtura.methods.forms._shared import GatedMlp
from mixtura.types import LayerShape

METHOD = {
    "paper": 38,
    "title": "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI "
    "Scale",
    "tags": [],
}


@final
class ResidualBranch(Form):
    """Add a dense feed-forward part to the experts' output, both weighted by a softmax of the token.

    ``c = softmax(W x + b)`` has two entries; the layer adds ``c[0] * MoE(x) + c[1] * MLP(x)``. With a router
    that sends a token to one expert it costs as much as two experts, and one of them needs no routing: the
    experts correct what the dense part makes. A pyramid, more experts in deeper layers, is a matter of
    ``layers`` in the configuration. ``width`` is that of the dense part, 0 for that of one expert.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; parameters of the dense part, 3 D width, and 2 D + 2 for the shares.

    Raises:
        SettingError: ``width`` is not in [0, 1e8].

    Example:
        >>> form = ResidualBranch(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> sum(one.numel() for one in form.parameters())  # 3 * 4 * 8 + 2 * 4 + 2
        106

    Differences from the paper:
        The dense part is gated, as our experts are; there it is of the experts' kind, two matrices with GELU.
        Experts are not copies of one at first. How many experts a token has is the router's business (one in
        the paper), and so is capacity. Distillation into fewer layers is no part of a form.

    Reference:
        DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale
        (paper 38); repository deepspeedai/DeepSpeed, by a summary of its code.
    """

    def __init__(self, shape: LayerShape, *, width: int = 0, seed: int = 0) -> None:
        super().__init__(shape)
        self.width = self.within("width", width, 0, 100_000_000)
        self.seed = seed
        self.shares = drawn(seed, 2, shape.d_model)
        self.shares_bias = nn.Parameter(torch.zeros(2))
        self.branch = GatedMlp(shape.d_model, width or shape.d_expert, seed + 1)

    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        del residual
        shares = F.linear(x, self.shares, self.shares_bias).softmax(-1)
        dense: Tensor = self.branch(x)
        return shares[:, :1] * passes[0](x) + shares[:, 1:] * dense
