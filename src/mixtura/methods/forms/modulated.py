"""MoFME's layer: a block that all experts share before them, and an adaptor behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import drawn
from mixtura.methods.forms import Form, Pass
from mixtura.types import LayerShape

METHOD = {
    "paper": 6,
    "title": "Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation",
    "tags": ["routes_apart"],
}


@final
class Modulated(Form):
    """Compute one block for all experts, let experts modulate its features, and adapt what comes out.

    ``z = gelu(B0 x + b0) * (B1 x + b1)`` is computed once a token; experts read ``z``, the router the token
    as it is before the norm; the layer adds ``adaptor(MoE(z))``, two matrices with GELU between them that are
    ``widening`` times as wide as the model. With the experts ``feature_modulated``, which scale and shift
    ``z`` feature by feature, an expert costs two D x D matrices.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; 2 D^2 + 2 D parameters of the block, 2 w D^2 + (w + 1) D of an adaptor
        that is w times as wide.

    Raises:
        SettingError: ``widening`` is not in [1, 64].

    Example:
        >>> form = Modulated(LayerShape(d_model=4, d_expert=8, num_experts=3), widening=2)
        >>> sum(one.numel() for one in form.parameters())  # 2 * 16 + 2 * 4 + 4 * 16 + 3 * 4
        116

    Differences from the paper:
        The block's norm is the decoder's RMSNorm, where there it is a LayerNorm. There is no dropout. Weights
        are drawn as the model's are. The averaging of weights over dropout samples of an
        uncertainty-aware router, whose training branch in the authors' code does not run, is left out: the
        router is any.

    Reference:
        Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation (paper
        6); repository RoyZry98/MoFME-Pytorch, ``models/moe/film.py``.
    """

    def __init__(self, shape: LayerShape, *, widening: int = 4, seed: int = 0) -> None:
        super().__init__(shape)
        self.widening = self.within("widening", widening, 1, 64)
        self.seed = seed
        width = shape.d_model
        self.curved, self.linear = drawn(seed, width, width), drawn(seed + 1, width, width)
        self.up = drawn(seed + 2, widening * width, width)
        self.down = drawn(seed + 3, width, widening * width)
        self.curved_bias, self.linear_bias, self.up_bias, self.down_bias = (
            nn.Parameter(torch.zeros(size)) for size in (width, width, widening * width, width)
        )

    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        shared = F.gelu(F.linear(x, self.curved, self.curved_bias))
        shared = shared * F.linear(x, self.linear, self.linear_bias)
        made = F.gelu(F.linear(passes[0](shared, route=residual), self.up, self.up_bias))
        return F.linear(made, self.down, self.down_bias)
