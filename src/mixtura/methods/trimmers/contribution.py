"""How much a neuron adds to its expert's output."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.methods.trimmers import NeuronsSeen, Trimmer

METHOD = {"paper": None, "title": "The mean square of what a neuron adds to its expert's output"}


@final
class Contribution(Trimmer):
    """Drop the neurons that add least to the output: mean squared activation times squared column length.

    The baseline of width pruning that looks at activations and weights and at no gradients, so that any model
    is streamed: what ``heapr`` is where the loss feels every direction of an expert's output alike.

    Shapes:
        ``squares [F]`` and ``down [D, F]`` to scores ``[F]``.

    Example:
        >>> import torch
        >>> down = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> Contribution().scores(NeuronsSeen(torch.tensor([4.0, 1.0]), down)).tolist()
        [4.0, 9.0]
    """

    def scores(self, seen: NeuronsSeen) -> Float[Tensor, " F"]:
        return seen.squares.float() * seen.down.float().square().sum(0)
