"""The states that balancers keep in each router module, and which balancers suit which routers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from mixtura.checkpoints.viewing.wrappers import is_elsewhere
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.methods import declared_tags, load_method
from mixtura.methods.balancers import Balancer
from mixtura.modeling.balance import LayerBalance
from mixtura.modeling.parts import READ_BY_ROUTERS
from mixtura.rerouting.seats import BALANCE, Seat

# What is said of a router that does not read this part of a balancer's state.
_UNREAD = {
    "bias": "reads no selection bias, so balancing by one has no effect",
    "allowed": "does not read which experts are allowed, so keeping some out has no effect",
}


def require_suited(balancers: Sequence[Balancer], seats: Iterable[Seat], router: type[Any] | None) -> None:
    """Refuse balancers that would act on nothing, or on the wrong numbers, beside a router.

    ``router`` is what decides, or is about to, in these seats; None for the family's own.

    Raises:
        UserError: a balancer does not suit it.
    """
    for seat in seats:
        for one in balancers:
            _require_suited(one, seat, router)


def _require_suited(balancer: Balancer, seat: Seat, router: type[Any] | None) -> None:
    name, tags = type(balancer).__name__, declared_tags(type(balancer))
    made_for = [tag.partition(":")[2] for tag in tags if tag.startswith("needs_router:")]
    if made_for and not any(router is load_method("routers", one) for one in made_for):
        raise UserError(
            f"the balancer {name} is made for the router {made_for[0]}, which does not decide in layer "
            f'{seat.layer.index}; set it in all layers first: mixtura.set_router(model, "{made_for[0]}")'
        )
    decider = type(seat.gate).__name__ if router is None else router.__name__
    read = frozenset() if router is None else declared_tags(router)
    if router is not None:
        for part in balancer.start(seat.layer.shape):
            if part in READ_BY_ROUTERS and f"reads:{READ_BY_ROUTERS[part]}" not in read:
                raise UserError(f"{decider} {_UNREAD[part]}; use a balancer with a loss, such as switch_loss")
    if "reads:router_weight" in tags:
        own = router is None or "keeps_weights" in read
        if not own or seat.width != seat.layer.shape.d_model:
            raise UserError(
                f"{name} runs experts on the router's rows, and {decider} has none that are like the "
                "experts' inputs; use another balancer, or a router with the tag keeps_weights"
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
