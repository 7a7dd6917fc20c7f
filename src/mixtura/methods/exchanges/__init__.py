"""How tokens get to the devices of their experts and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from jaxtyping import Float, Int
from torch import Tensor

KIND = {
    "base": "Exchange",
    "summary": "Chooses the hops in which tokens go to their experts' devices, and what is sent.",
    "tags": {
        "approximate": "sends less than every token: outputs are close to those of one process, not equal",
    },
}
Hop = Literal["all", "between", "within"]


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """What is sent in place of rows.

    Attributes:
        rows: what goes to the experts.
        seats: where each of them goes: an expert on a device, by its number among all such.
        unpack: makes outputs of the rows that were given of the outputs of those that were sent.
    """

    rows: Float[Tensor, "M D"]
    seats: Int[Tensor, " M"]
    unpack: Callable[[Tensor], Tensor]


class Exchange(ABC):
    """Says how rows travel. Sending and counting them, and their gradients, is the core's."""

    @abstractmethod
    def hops(self) -> tuple[Hop, ...]:
        """The steps in which a row goes to its device.

        ``all`` is from any device to any; ``between`` to the node, from each device to the one of the same
        place; ``within`` to the place, on the same node. Either ``all`` alone, or the other two in some
        order.
        """

    def pack(self, rows: Float[Tensor, "N D"], seats: Int[Tensor, " N"]) -> Packed:
        """What to send in place of the rows of this device; by default themselves. Differentiable."""
        return Packed(rows, seats, lambda outputs: outputs)
