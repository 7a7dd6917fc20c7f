"""Deciding how many bits every expert is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from numpy import ndarray

KIND = {
    "base": "Allocator",
    "summary": "Predicts what each expert loses in fewer bits; by that a budget's bytes are shared out.",
    "tags": {
        "by_layer": "every layer has the same share of its bytes left: experts compete within a layer alone",
    },
}


@final
@dataclass(frozen=True, slots=True)
class ExpertsSeen:
    """What text says of all routed experts, M in one row, and of the O ways in which each can be stored.

    Attributes:
        layers: the place of each expert's layer among those that have experts, from 0.
        loads: how often each expert was chosen.
        weights: its routing weights, added up.
        bits: bits of a weight that each way takes, scales included; the first is the expert as it is.
        errors: squared error of the layer's output where this expert alone is stored in this way.
    """

    layers: Int[ndarray, " M"]
    loads: Int[ndarray, " M"]
    weights: Float[ndarray, " M"]
    bits: Float[ndarray, " O"]
    errors: Float[ndarray, "M O"]


class Allocator(ABC):
    """Predicts what each expert loses in fewer bits.

    The core then chooses a way for every expert such that the predicted losses add up to the least within
    the bytes there are. `mixtura fit` measures what comes of it beside mixtures of its own.
    """

    @abstractmethod
    def losses(self, seen: ExpertsSeen) -> Float[ndarray, "M O"]:
        """The loss of each way of storing each expert; what matters is how they compare."""
