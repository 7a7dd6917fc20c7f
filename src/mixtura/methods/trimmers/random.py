"""Neurons by lot."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._drawing import generator_of
from mixtura.methods.trimmers import NeuronsSeen, Trimmer

METHOD = {
    "paper": None,
    "title": "Neurons by lot, the baseline of all trimmers",
    "tags": ["label_dependent"],
}


@final
class Random(Trimmer):
    """Drop neurons by lot, the same places in every expert. What any score must beat.

    Shapes:
        An expert of F neurons to scores ``[F]``.

    Example:
        >>> seen = NeuronsSeen(torch.ones(3), torch.ones(2, 3))
        >>> [round(score, 2) for score in Random(seed=0).scores(seen).tolist()]
        [0.5, 0.77, 0.09]
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, seen: NeuronsSeen) -> Float[Tensor, " F"]:
        return torch.rand(len(seen.squares), generator=generator_of(self.seed))
