"""MoFME's experts: each scales and shifts the features that it reads, by linear functions of them."""

from __future__ import annotations

from typing import final

import torch
from torch import nn

from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices, grouped
from mixtura.types import LayerShape, Ran, Rows

METHOD = {
    "paper": 6,
    "title": "Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation",
    "tags": ["token_independent"],
}


@final
class FeatureModulated(Bank):
    """Experts that modulate features: ``(P_e z + p_e) * z + (A_e z + a_e)``, product feature by feature.

    An expert has two D x D matrices and two biases, whatever ``d_expert`` is. They are meant for the form
    ``modulated``, which computes ``z`` once for all experts and adapts their sum; without it ``z`` is the
    normed token.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``scale [E, D, D]`` and ``shift [E, D, D]`` with their biases:
        E (2 D^2 + 2 D) numbers.

    Example:
        >>> bank = FeatureModulated(LayerShape(d_model=4, d_expert=1, num_experts=3))
        >>> sum(one.numel() for one in bank.parameters())
        120

    Differences from the paper:
        Only chosen experts run, where the authors' code runs all and weighs those that are not chosen by 0.
        Weights are drawn as the model's are.

    Reference:
        Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation (paper
        6); repository RoyZry98/MoFME-Pytorch, ``models/moe/film.py``.
    """

    def __init__(self, shape: LayerShape, *, seed: int = 0) -> None:
        super().__init__(shape)
        self.seed = seed
        generator, width = begun(seed), shape.d_model
        self.scale = drawn_matrices(generator, shape.num_experts, width, width)
        self.shift = drawn_matrices(generator, shape.num_experts, width, width)
        self.scale_bias, self.shift_bias = (
            nn.Parameter(torch.zeros(shape.num_experts, width)) for _ in range(2)
        )

    def run(self, rows: Rows) -> Ran:
        z = rows.gathered
        scale = grouped(z, self.scale, rows.offsets, self.scale_bias)
        return Ran(scale * z + grouped(z, self.shift, rows.offsets, self.shift_bias))
