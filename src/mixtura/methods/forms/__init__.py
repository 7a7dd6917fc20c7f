"""What a layer makes of one or several passes through routers and experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods.settings import Ranged
from mixtura.types import LayerShape

KIND = {
    "base": "Form",
    "summary": "Makes a layer of one or several passes through routers and experts.",
    "tags": {
        "routes_apart": "has routers read other tokens than experts, so none may run or read the experts",
    },
}


@runtime_checkable
class Pass(Protocol):
    """One router or mixer with its experts and its shared expert. Called once for each batch of tokens."""

    def __call__(
        self, x: Float[Tensor, "T D"], route: Float[Tensor, "T D"] | None = None
    ) -> Float[Tensor, "T D"]:
        """What the experts add to ``x``; 0 for padding. The router reads ``route`` instead where given."""


class Form(nn.Module, Ranged, ABC):
    """What an MoE layer computes with its passes.

    The sizes of a layer's plan are those of one pass. Nothing is kept on the module; parameters are drawn
    from the method's own ``seed``, with a variance of one over their inputs.

    Attributes:
        share: what the passes have in common, ``experts`` or nothing; routers are each pass's own.
    """

    share: ClassVar[Literal["experts", "nothing"]] = "nothing"

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    def num_passes(self) -> int:
        """How many passes the layer has."""
        return 1

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T D"], passes: Sequence[Pass]
    ) -> Float[Tensor, "T D"]:
        """What the layer adds to ``residual``, the tokens before the layer's norm; ``x`` are the normed ones.

        Every pass is called once, in order. What is made of a token depends on what the passes make of it,
        and otherwise on that token alone.
        """

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        """Give matrices drawn with a variance of one over their inputs a common ``deviation`` instead."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.mul_(deviation * parameter.shape[-1] ** 0.5)
