"""Mixing tokens or experts softly, where nothing is chosen and everything has a share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

KIND = {
    "base": "Mixer",
    "summary": "Mixes tokens or experts softly instead of choosing.",
    "tags": {
        "reads:FIELD": "looks at this optional field of `RouterInput`",
        "token_independent": "a token's output depends on that token alone",
        "looks_ahead": "a token's output may depend on later tokens",
        "causal_inference": "looks ahead in training, but not where `training` is false and `causal` true",
        "batch_dependent": "a sequence's output may depend on the other sequences of the batch",
        "expert_rows": "scores experts by a token's products with the rows of its parameter `weight` [E, D]",
        "compiles": "gives the same output under `torch.compile`",
    },
}


class Mixer(nn.Module, ABC):
    """Computes a layer's output from tokens and experts where a choice of experts would not say enough.

    It stands in a layer in the place of a router. Like a router it keeps nothing on the module, draws
    its parameters from its own ``seed`` and says by tags what it promises and needs.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        """The output of T tokens, zero where they are not valid, and who had which share in it.

        The shares are a `Routing` like any other (see `mixtura.methods.mixers._shared.shares`), so that
        losses, metrics and analyses read mixers as they read routers.

        Raises:
            UserError: a field of the input that the method cannot do without is not there.
        """
