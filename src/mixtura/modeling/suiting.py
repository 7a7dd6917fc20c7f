"""Which balancers suit what decides in a layer: what they change must be read, what they read be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from mixtura.errors import UserError
from mixtura.methods import declared_tags, load_method
from mixtura.methods.balancers import Balancer
from mixtura.methods.mixers import Mixer
from mixtura.types import LayerShape

# Parts of a balancer's state that act through a router: the field of its input that each becomes, and what is
# said of a router that does not look at it.
_READ_BY_ROUTERS: Mapping[str, tuple[str, str]] = {
    "bias": ("selection_bias", "reads no selection bias"),
    "allowed": ("allowed", "does not read which experts are allowed"),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Decider:
    """What decides in a layer, as far as balancers go by it.

    Attributes:
        method: the class of the router or mixer; `None` for the router of a family of transformers, which is
            watched and steered from outside.
        name: of the family's router.
        shape: of the layer.
        has_rows: whether experts are scored by products with a row for each, like the experts' inputs.
        bank: the class of the experts; `None` where they are a family's.
        choosing: how to have the router that a balancer is made for, with its name to fill in.
    """

    method: type[Any] | None
    shape: LayerShape
    has_rows: bool
    name: str = ""
    bank: type[Any] | None = None
    choosing: str = "take the router {}"

    @property
    def tags(self) -> frozenset[str]:
        """Those of the method; none of a family's router."""
        return frozenset() if self.method is None else declared_tags(self.method)

    @property
    def what(self) -> str:
        """A mixer or a router."""
        return "mixer" if self.method is not None and issubclass(self.method, Mixer) else "router"

    def __str__(self) -> str:
        return f"the {self.what} {self.name if self.method is None else _name(self.method)}"


def require_suited(balancer: Balancer, decider: Decider) -> None:
    """Refuse a balancer that would act on nothing, or on the wrong numbers, beside what decides.

    Raises:
        UserError: it is made for another router, what it changes is not read, what it reads is not there, or
            what it evens out is even whatever is learned.
    """
    name, asks = f"the balancer {_name(type(balancer))}", declared_tags(type(balancer))
    wanted = [tag.partition(":")[2] for tag in asks if tag.startswith("needs_router:")]
    if wanted and not any(decider.method is load_method("routers", one) for one in wanted):
        raise UserError(
            f"{name} is made for the router {' or '.join(wanted)}, got {decider}; "
            f"{decider.choosing.format(wanted[0])}, or take another balancer"
        )
    state = balancer.start(decider.shape)
    for entry, (field, unread) in _READ_BY_ROUTERS.items():
        if decider.method is not None and entry in state and f"reads:{field}" not in decider.tags:
            raise UserError(
                f"{decider} {unread}, so {name} would change nothing; choose another {decider.what}, or a "
                f"balancer such as {'z_loss' if decider.what == 'mixer' else 'switch_loss'}"
            )
    if decider.what == "mixer" and ("by_load" in asks or "alpha" in state):
        raise UserError(
            f"{decider} gives every expert every token, so {name}, which goes by which experts get a token, "
            "would change nothing; choose another balancer or a router"
        )
    _require_experts(name, asks, decider)
    if "reads:router_weight" in asks and not decider.has_rows:
        raise UserError(
            f"{decider} scores experts by no matrix with a row for each that is like the experts' inputs, "
            f"which {name} couples to the experts; choose another balancer, or a {decider.what} such as "
            f"{'dense' if decider.what == 'mixer' else 'top_k'}"
        )


def _require_experts(name: str, asks: frozenset[str], decider: Decider) -> None:
    """Refuse a balancer that reads what these experts have not."""
    for field, tag, what in (
        ("experts", "materialises", "matrices"),
        (
            "gradients",
            "own_matrices",
            "matrices of each expert that could be compared",
        ),
    ):
        if f"reads:{field}" not in asks:
            continue
        if "axes" in decider.tags:
            raise UserError(
                f"{decider} balances rows and columns of a grid, but {name} reads single experts; choose "
                "another balancer, such as switch_loss"
            )
        if decider.bank is not None and tag not in declared_tags(decider.bank):
            raise UserError(
                f"the experts {_name(decider.bank)} have no {what}, which {name} reads; choose another "
                "balancer, or experts such as ffn"
            )


def _name(method: type[Any]) -> str:
    """A method's name, which is that of its file."""
    return method.__module__.rpartition(".")[2].removeprefix("mixtura_outside_")
