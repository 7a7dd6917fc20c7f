"""Numbers taken of each assignment while an expert runs, for pruners and analyses to ask for by name."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

KIND = {"base": "Statistic", "summary": "A number per assignment, reduced per expert and domain."}


class Statistic(ABC):
    """A number per assignment of a token to an expert.

    The mean over an expert's assignments is kept; of a method whose name starts with ``max_``, the
    maximum.
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
