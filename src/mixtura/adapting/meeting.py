"""What adapters met since the last step of the optimizer, as those that learn in stages are told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from jaxtyping import Float, Num
from torch import Tensor


@final
@dataclass(slots=True)
class Met:
    """Sums over the tokens of all passes since the last step; see `mixtura.types.Progress`."""

    loads: Float[Tensor, " E"] | None = None
    moment: Float[Tensor, "cols cols"] | None = None
    number: int = 0

    def add_loads(self, more: Num[Tensor, " E"]) -> None:
        """What experts got in one more pass."""
        self.loads = more.double() if self.loads is None else self.loads + more

    def add_moment(self, more: Float[Tensor, "cols cols"]) -> None:
        """The sum of the outer products of one more pass."""
        self.moment = more if self.moment is None else self.moment + more

    def of_all_processes(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, int]:
        """Loads, moment and number of tokens, of all processes that train together."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.loads, self.moment, self.number
        number = torch.tensor(self.number, device=device)
        for total in (self.loads, self.moment, number):
            if total is not None:
                dist.all_reduce(total)
        return self.loads, self.moment, int(number)
