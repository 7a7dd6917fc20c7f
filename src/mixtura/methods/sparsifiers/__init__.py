"""Pruning single weights while a model is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.methods.settings import Ranged

Masks = dict[str, Bool[Tensor, "..."]]
KIND = {
    "base": "Sparsifier",
    "summary": "Sets ever more weights to zero while a model is trained, and may bring some back.",
}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """What a sparsifier reads of a training. Names are those of matrices, or of stacks of one an expert.

    Attributes:
        weights: after the optimizer's last step; 0 where a mask is False.
        gradients: of that step; of those that are 0, too.
        masks: True where a weight is trained.
        step: steps of the optimizer that are done.
        num_steps: steps of the whole training.
    """

    weights: Mapping[str, Float[Tensor, "..."]]
    gradients: Mapping[str, Float[Tensor, "..."]]
    masks: Mapping[str, Bool[Tensor, "..."]]
    step: int
    num_steps: int


class Sparsifier(Ranged, ABC):
    """Says which weights are zero, from time to time in a training. Nothing is kept on the method."""

    def start(self, weights: Mapping[str, Float[Tensor, "..."]]) -> Masks:
        """Which weights are trained from the first step on; all of them, unless a method says otherwise."""
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}

    @abstractmethod
    def due(self, step: int, num_steps: int) -> bool:
        """Whether masks change after so many steps. They never do after the last."""

    @abstractmethod
    def masks(self, training: Training) -> Masks:
        """Which weights are trained from now on."""
