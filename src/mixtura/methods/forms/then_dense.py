"""OpenMoE's layers: experts, then a dense feed-forward part with a norm and a residual of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.methods._norms import RMSNorm
from mixtura.methods.forms import Form, Pass
from mixtura.methods.forms._shared import GatedMlp
from mixtura.types import LayerShape

METHOD = {
    "paper": 83,
    "title": "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
    "tags": [],
}


@final
class ThenDense(Form):
    """Follow the experts by a dense feed-forward part that reads the tokens with what the experts added.

    ``h = residual + MoE(x)``; the layer adds ``MoE(x) + MLP(norm(h))``. ``width`` is that of the dense part,
    0 for that of one expert.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; parameters of the dense part, 3 D width, and D of its norm.

    Raises:
        SettingError: ``width`` is not in [0, 1e8].

    Example:
        >>> form = ThenDense(LayerShape(d_model=4, d_expert=8, num_experts=3), width=2)
        >>> sum(one.numel() for one in form.parameters())  # 3 * 4 * 2 + 4
        28

    Differences from the paper:
        None known in the layer, which was read in a third-party port: there the gated activation multiplies
        three products, here two.

    Reference:
        OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models (paper 83), by its port in
        ColossalAI.
    """

    def __init__(self, shape: LayerShape, *, width: int = 0, seed: int = 0) -> None:
        super().__init__(shape)
        self.width = self.within("width", width, 0, 100_000_000)
        self.seed = seed
        self.norm = RMSNorm(shape.d_model)
        self.branch = GatedMlp(shape.d_model, width or shape.d_expert, seed)

    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        added = passes[0](x)
        behind: Tensor = self.branch(self.norm(residual + added))
        return added + behind
