"""Guessing which experts later layers will need, so that they are read before that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.methods.caches import Key

KIND = {
    "base": "Prefetcher",
    "summary": "Guesses which experts later layers will need, so that they are read before that.",
    "tags": {
        "reads:trace": "is given a recorded trace before the first call (`Prefetcher.learn`)",
        "reads:tokens": "looks at this layer's tokens themselves (`Sight.tokens`)",
        "reads:gates": "asks what a later layer's router would think of this layer's tokens (`Sight.gates`)",
    },
}


@final
@dataclass(frozen=True, slots=True)
class Sight:
    """What is known when a layer's experts are in memory and about to run.

    Attributes:
        layer: number of the layer.
        experts: those that it needs, ascending.
        num_experts: of every layer.
        gates: gives, for a layer by its number, the mean share that its router would give each of its experts
            if this layer's tokens were its own; None where that cannot be known.
        tokens: what this layer's router was given, a row each; None where that is not known.
    """

    layer: int
    experts: tuple[int, ...]
    num_experts: tuple[int, ...]
    gates: Callable[[int], tuple[float, ...] | None]
    tokens: Float[Tensor, "T D"] | None = None


class Prefetcher(ABC):
    """Says which experts will be needed next. Reading them, and counting what that was worth, is the core's.

    A guess costs nobody an expert that is in memory: what is read ahead lies in room of its own until it is
    needed or has to go.
    """

    def learn(self, pairs: Mapping[int, Sequence[Sequence[float]]]) -> None:
        """Be given, by layer, how often its experts were followed by those of the next, in recorded text.

        Args:
            pairs: for layer l, rows of its experts with a count for each expert of layer l + 1.
        """
        del pairs

    def num_bytes(self, num_experts: Sequence[int], width: int) -> int:
        """Memory that it comes to take for a model, which is set apart from that of experts.

        Args:
            num_experts: of every layer.
            width: of the tokens.
        """
        del num_experts, width
        return 0

    def begin(self) -> None:
        """Be told that a new text begins."""
        return

    @abstractmethod
    def guess(self, sight: Sight) -> Sequence[Key]:
        """The experts that will be needed soonest and likeliest, best first.

        Told once for each call of a layer, in order. Experts that are in memory may be among them.
        """
