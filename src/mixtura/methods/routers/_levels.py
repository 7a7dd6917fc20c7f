"""Choosing in two steps: a place, such as a node or a group, and experts of that place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from torch import Tensor

from mixtura.methods._precision import exact
from mixtura.methods._scores import softmax
from mixtura.methods.routers._shared import best


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevels:
    """Which of G places each token goes to, and which K of the R experts there.

    Attributes:
        place: the most probable place.
        local: the experts there, from 0 at each place.
        places: the probabilities of places.
        within: those of the experts of the token's place.
        inside: those of all experts, each place by itself.
        logits: whose softmax over all experts is ``scores``.
    """

    place: Int[Tensor, "T 1"]
    local: Int[Tensor, "T K"]
    places: Float[Tensor, "T G"]
    within: Float[Tensor, "T R"]
    inside: Float[Tensor, "T G R"]
    logits: Float[Tensor, "T E"]

    @property
    def chosen(self) -> Int[Tensor, "T K"]:
        """The experts counted over all places, the first place's first."""
        return self.place * self.inside.shape[2] + self.local

    @property
    def scores(self) -> Float[Tensor, "T E"]:
        """The probability of each expert's place times that of the expert there."""
        return (self.places[..., None] * self.inside).flatten(1)


def two_levels(
    place_logits: Float[Tensor, "T G"], local_logits: Float[Tensor, "T G R"], count: int
) -> TwoLevels:
    """The most probable place and its ``count`` most probable experts; of equal ones the lowest index."""
    places, inside = softmax(place_logits), exact(local_logits).softmax(-1)
    place = best(places, 1)
    within = inside.gather(1, place[..., None].expand(-1, 1, inside.shape[2])).squeeze(1)
    return TwoLevels(
        place=place,
        local=best(within, count),
        places=places,
        within=within,
        inside=inside,
        logits=(place_logits[..., None] + local_logits.log_softmax(-1)).flatten(1),
    )
