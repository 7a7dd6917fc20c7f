"""The states that balancers keep in each router module, and whether balancers suit what decides in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from mixtura.checkpoints.viewing.wrappers import is_elsewhere
from mixtura.errors import UnsupportedModelError
from mixtura.methods import declared_tags
from mixtura.methods.balancers import Balancer
from mixtura.modeling.balance import LayerBalance
from mixtura.modeling.suiting import Decider, require_suited
from mixtura.rerouting.seats import BALANCE, Seat


def require_each_suited(
    balancers: Sequence[Balancer], seats: Iterable[Seat], router: type[Any] | None
) -> None:
    """Refuse balancers that would act on nothing, or on the wrong numbers, beside a router.

    ``router`` is what decides, or is about to, in these seats; None for the family's own.

    Raises:
        UserError: a balancer does not suit it.
    """
    for seat in seats:
        for one in balancers:
            require_suited(one, _decider(seat, router))


def _decider(seat: Seat, router: type[Any] | None) -> Decider:
    own = router is None or "keeps_weights" in declared_tags(router)
    first = f"set it in all layers first, layer {seat.layer.index} too"
    return Decider(
        method=router,
        name=type(seat.gate).__name__,
        shape=seat.layer.shape,
        has_rows=own and seat.width == seat.layer.shape.d_model,
        choosing=first + ': mixtura.set_router(model, "{}")',
    )


def begin(seat: Seat, balancers: Sequence[Balancer]) -> None:
    """Give a router module the balancers' states, begun from the family's own bias where it has one.

    Raises:
        UnsupportedModelError: that bias is offloaded or sharded.
    """
    own = LayerBalance(balancers, seat.layer.shape)
    held = seat.layer.correction_bias()
    biased = biases(own)
    if held is not None and seat.router is None and biased:
        if is_elsewhere(held):
            raise UnsupportedModelError(
                f"the correction bias of layer {seat.layer.index} is offloaded or sharded, so that balancing "
                "could not move it; balance the model before that"
            )
        biased[0].copy_(held)
    setattr(seat.gate, BALANCE, own.to(seat.device))


def biases(own: LayerBalance) -> list[Tensor]:
    """The biases of those balancers that keep one."""
    states = [own.state(place) for place in range(len(own.balancers))]
    return [state["bias"] for state in states if "bias" in state]


def balance_of(seat: Seat) -> LayerBalance:
    """The balancers of a seat that is known to have some."""
    found = seat.balance
    assert found is not None
    return found
