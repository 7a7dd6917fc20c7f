"""Chain-of-experts: the same experts several times in one layer, each time routed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.forms import Form, Pass
from mixtura.types import LayerShape

METHOD = {
    "paper": 14,
    "title": "Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models",
    "tags": [],
}


@final
class Chain(Form):
    """Run the layer's experts ``iterations`` times, so that experts read what others have made of a token.

    Each iteration has a router of its own and all have the same experts: ``h <- h + MoE_t(h)``, beginning
    with the normed token; the layer adds the sum of what the iterations added. So a layer of K experts a
    token and two iterations reaches as many pairs of experts as one of 2K with no more weights than a
    router. With ``mode="released"`` the layer's output is the last ``h`` alone, in place of the token.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; no parameters of its own; each iteration after the first adds a router's.

    Raises:
        SettingError: ``iterations`` is not in [1, 64], or ``mode`` is unknown.

    Example:
        >>> form = Chain(LayerShape(d_model=2, d_expert=8, num_experts=3), iterations=3)
        >>> x = torch.ones(1, 2)
        >>> form(x, x, [lambda h, route=None: h] * 3)  # 1 + 2 + 4, as each pass doubles what it reads
        tensor([[7., 7.]])

    Differences from the paper:
        There the layer's output is the last ``h``, and the stream of tokens before the norm is lost:
        ``mode="released"``, as in the authors' shipped configuration. By default the sum of the iterations is
        added to that stream, as every other layer's output is. Their shared experts run in each iteration,
        as here. Their other ways of adding residuals are left out.

    Reference:
        Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models (paper 14);
        repository ZihanWang314/CoE.
    """

    share: ClassVar[Literal["experts", "nothing"]] = "experts"

    def __init__(
        self, shape: LayerShape, *, iterations: int = 2, mode: Literal["added", "released"] = "added"
    ) -> None:
        super().__init__(shape)
        self.iterations = self.within("iterations", iterations, 1, 64)
        self.mode = mode

    @property
    def num_passes(self) -> int:
        """One an iteration."""
        return self.iterations

    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        added = torch.zeros_like(x)
        for one in passes:
            added = added + one(x + added)
        return added if self.mode == "added" else x + added - residual
