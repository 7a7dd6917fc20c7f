"""What passes between the expert kernels and the parts that feed or watch them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# How families call the router in a block, beside its experts.
ROUTER_NAMES = ("gate", "router")


class ExpertTensors(NamedTuple):
    """The weights of one expert, in the orientation and row order of its module.

    Attributes:
        up: what makes the hidden features: gate and up projection in one matrix, or up alone.
        down: what makes the model width again.
        up_bias: added after ``up``, or None.
        down_bias: added after ``down``, or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> ExpertTensors:
        """The weights in a dtype."""
        return ExpertTensors(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # type: ignore[arg-type]


@runtime_checkable
class ExpertStore(Protocol):
    """Where the experts of one layer live: packed bits, a file, anything but plain parameters.

    An experts module that has one as its attribute ``mixtura_store`` runs from it.
    """

    num_experts: int

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """Dense tensors of one expert, ready to multiply in ``dtype``; they need not be kept."""
        ...


@runtime_checkable
class LendingStore(ExpertStore, Protocol):
    """A store that holds a few experts at a time and reads the others when they are asked for.

    ``like`` has the sizes, dtype and strides of an expert of plain numbers, or is None where experts are
    decoded when they are asked for.
    """

    like: ExpertTensors | None

    def expect(self, experts: Sequence[int], num_rows: Sequence[int], x: Float[Tensor, "T D"] | None) -> None:
        """The experts that will be asked for next, in this order, and how many of the tokens go to each.

        Args:
            experts: their numbers.
            num_rows: tokens of each.
            x: the tokens of a call that begins; None where one goes on.
        """
        ...

    def lend(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """What `get` gives, as it is until the next expert is asked for."""
        ...


@runtime_checkable
class RehearsingStore(Protocol):
    """A store whose experts are slow to come, for which a few can stand in while a layer is tried."""

    def rehearsing(self) -> AbstractContextManager[None]:
        """Until it ends, experts may be others of their form: the same ones however they are asked for."""
        ...


def rehearsal(experts: object) -> AbstractContextManager[None]:
    """Until it ends, an experts module is only tried: whatever reads slowly may read less."""
    store = getattr(experts, "mixtura_store", None)
    return store.rehearsing() if isinstance(store, RehearsingStore) else nullcontext()


@runtime_checkable
class ExpertExchange(Protocol):
    """Runs experts of which this process may not hold all.

    An experts module that has one as its attribute ``mixtura_exchange`` runs through it.
    """

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        token_ids: Int[Tensor, " N"],
        expert_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; an expert outside [0, E) is absent."""
        ...


@runtime_checkable
class AssignmentObserver(Protocol):
    """Sees the rows of every expert once, when they run anyway.

    An experts module that has one as its attribute ``mixtura_observer`` tells it what it does.
    """

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """A call begins: the tokens, and the choices exactly as they reach the experts."""
        ...

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        inputs: Float[Tensor, "n D"],
        outputs: Float[Tensor, "n D"],
    ) -> None:
        """One expert ran on n tokens; ``outputs`` are before they are weighted."""
        ...

    def finish(self) -> None:
        """The call ended."""
        ...
