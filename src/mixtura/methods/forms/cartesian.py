"""CartesianMoE: two groups of experts one after the other, whose pairs are the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.methods._norms import RMSNorm
from mixtura.methods.forms import Form, Pass
from mixtura.types import LayerShape

METHOD = {
    "paper": 113,
    "title": "CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in "
    "Mixture-of-Experts",
    "tags": [],
}


@final
class Cartesian(Form):
    """Send a token to experts of a group A and then to experts of a group B that reads what A made.

    ``h = MoE_A(x)``; the layer adds ``h + MoE_B(norm(residual + h))``. Each group has its own router, experts
    and shared expert, so a pair (A_i, B_j) acts as one expert: E experts in each group make E * E pairs, and
    pairs share their halves. Sizes are those of one group: top-2 of E in each costs what top-4 costs.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; D parameters for the norm between the groups.

    Example:
        >>> form = Cartesian(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> form.num_passes, sum(one.numel() for one in form.parameters())
        (2, 4)

    Differences from the paper:
        The authors' code for training is not public; the layer is that of a summary of the paper. Balancing
        losses, one for each group, are those of the configuration.

    Reference:
        CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in
        Mixture-of-Experts (paper 113, abstract and a summary).
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.norm = RMSNorm(shape.d_model)

    @property
    def num_passes(self) -> int:
        """The two groups."""
        return 2

    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        first = passes[0](x)
        return first + passes[1](self.norm(residual + first))
