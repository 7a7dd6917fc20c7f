"""Numbers taken of each assignment while an expert runs, for pruners and analyses to ask for by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from torch import Tensor

KIND = {
    "base": "Statistic",
    "summary": "A number per assignment, reduced per expert and domain.",
    "tags": {
        "reads:FIELD": "its numbers are multiplied by what it makes of this field of `LayerTokens`",
    },
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTokens:
    """What one layer did with the tokens of a batch; padding is among them, without a choice.

    Attributes:
        chosen: the experts of each token; ids of E or more are absent choices.
        weights: their routing weights, 0 for absent ones.
        residual: the hidden states that the experts' output is added to, before the norm that makes the
            experts' inputs of them; only for the tag ``reads:residual``.
        routed: the sum of each token's weighted expert outputs, without shared experts; only for the tag
            ``reads:routed``.
        logits: what the router's matrix made of each token, before any bias for selection; only for the
            tag ``reads:logits``.
    """

    chosen: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    residual: Float[Tensor, "T D"] | None = None
    routed: Float[Tensor, "T D"] | None = None
    logits: Float[Tensor, "T E"] | None = None


class Statistic(ABC):
    """A number per assignment of a token to an expert.

    The mean over an expert's assignments is kept; of a method whose name starts with ``max_``, the
    maximum. Most methods look at one expert's rows alone (`measure`). One that needs the whole layer says
    so by tags (``"reads:routed"``), and its numbers are multiplied by a `factor`.
    """

    @abstractmethod
    def measure(
        self,
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """The number of each assignment of one expert.

        Args:
            inputs: the rows the expert was given.
            outputs: what it returned for them, before weighting.
            weights: the routing weights they are added up with.
        """

    def factor(self, tokens: LayerTokens) -> Float[Tensor, "T K"]:
        """What the number of each of a token's assignments is multiplied by.

        Called once all experts of the layer have run, for methods with a tag ``reads:FIELD`` only. What
        it says of absent choices is not used.
        """
        raise NotImplementedError(f"{type(self).__name__} has a tag reads:FIELD, and no factor")
