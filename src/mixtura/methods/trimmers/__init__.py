"""Scoring the neurons of experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

KIND = {
    "base": "Trimmer",
    "summary": "Scores the neurons of an expert, of which those of least score are dropped.",
    "tags": {
        "reads:gradients": "it reads gradients of the loss, for which the model runs backwards, in memory",
        "label_dependent": "which neurons go depends on the places that they happen to have",
    },
}


@final
@dataclass(frozen=True, slots=True)
class NeuronsSeen:
    """What text says of the neurons of one expert. A neuron is an input of its last matrix.

    Attributes:
        squares: the mean square of what each neuron puts out, over the tokens that reach the expert.
        down: the expert's last matrix; a neuron's column is what it adds to the output.
        pulls: the mean square of the loss's derivative by each neuron's output: of the gradient by the
            expert's output, before it is weighted, times the neuron's column. None without the tag.
    """

    squares: Float[Tensor, " F"]
    down: Float[Tensor, "D F"]
    pulls: Float[Tensor, " F"] | None = None


class Trimmer(ABC):
    """Scores the neurons of an expert: what is lost if one of them is dropped.

    Every expert loses as many neurons, those of its own that have the least score.
    """

    @abstractmethod
    def scores(self, seen: NeuronsSeen) -> Float[Tensor, " F"]:
        """A score for each neuron; the larger, the more it is missed."""
