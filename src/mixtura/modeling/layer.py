"""One MoE layer of our own: a router or mixer, experts, and the sum of what they return.

Layers share by holding the same module: one `Experts` in several layers is a common pool, one router
in several layers decides in all of them, and an `ExpertPool` lets a layer reach the experts of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import UnknownNameError, UserError, check_range
from mixtura.methods import declared_tags
from mixtura.methods._activations import swiglu
from mixtura.methods._capacity import Order, Overflow, limit, room
from mixtura.methods._precision import exact
from mixtura.methods.mixers import Mixer
from mixtura.methods.routers import Router
from mixtura.modeling.experts import ExpertMatrices, ExpertPool, Experts, SharedExpert
from mixtura.types import LayerShape, RouterInput, Routing

__all__ = [
    "Capacity",
    "ExpertMatrices",
    "ExpertPool",
    "Experts",
    "MoELayer",
    "SharedExpert",
    "require_decodable",
    "swiglu",
    "uses_experts",
]

# Before the names under which experts' histories are kept beside those of the router.
_EXPERTS = "experts."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A limit on tokens per expert: ``factor`` times its even share of the assignments, rounded up.

    It holds in training and in encoders. A decoder does not know at inference how many tokens are to come,
    and would drop other ones token by token than in a whole sequence: there nothing is dropped. ``order``
    and ``overflow`` are those of `mixtura.methods._capacity.limit`.

    Raises:
        SettingError: ``factor`` is not in [1e-6, 1e6], where nothing or everything would be dropped.
        UnknownNameError: there is no such ``order`` or ``overflow``.
    """

    factor: float
    order: Order = "arrival"
    overflow: Overflow = "drop"

    def __post_init__(self) -> None:
        check_range("Capacity", "factor", self.factor, 1e-6, 1e6)
        for name, value, known in (("order", self.order, Order), ("overflow", self.overflow, Overflow)):
            if value not in get_args(known):
                raise UnknownNameError(f"{name} of Capacity", str(value), get_args(known))

    def apply(self, routing: Routing) -> Routing:
        """The routing within the limit."""
        even = routing.token_ids.shape[0] / max(int(routing.valid.sum()), 1)
        capacity = room(routing.valid, routing.num_experts, self.factor * even)
        return limit(routing, capacity, order=self.order, overflow=self.overflow)


@final
class MoELayer(nn.Module):
    """A router or mixer, experts and their sum. Any router goes with any experts of its shape.

    >>> import mixtura
    >>> from mixtura.types import LayerShape
    >>> shape = LayerShape(d_model=8, d_expert=16, num_experts=4)
    >>> layer = MoELayer(mixtura.create("routers", "top_k", shape, top_k=2), Experts(shape))
    >>> output, routing = layer(RouterInput.of(torch.ones(5, 8)))
    >>> output.shape, routing.load.sum().item()
    (torch.Size([5, 8]), 10)

    Args:
        router: decides who goes where; a mixer decides and computes.
        experts: of as many experts as the router knows.
        shared: what every valid token visits besides.
        capacity: a limit on tokens per expert; without one nothing is dropped.
        adds_losses: whether the losses of what its own experts are made of are this layer's to add; of
            several passes through the same experts they are the first's.

    Raises:
        UserError: router and experts are of different sizes, the router is set for a pool of another size,
            a mixer is given a capacity, or what decides reads experts that have no matrices.
    """

    def __init__(
        self,
        router: Router | Mixer,
        experts: Experts | ExpertPool,
        *,
        shared: SharedExpert | None = None,
        capacity: Capacity | None = None,
        adds_losses: bool = True,
    ) -> None:
        super().__init__()
        if not _fit(router, experts.shape):
            raise UserError(
                f"the router is made for {router.shape}, the experts are {experts.shape}; "
                "make both of one shape"
            )
        if capacity is not None and isinstance(router, Mixer):
            raise UserError("a mixer sends no token anywhere, so it takes no capacity; leave capacity out")
        if not experts.has_matrices and uses_experts(router):
            raise UserError(
                f"{_name(router)} runs or reads the experts' matrices, which {_name(experts.bank)} has not; "
                "choose experts with the tag materialises, such as ffn, or a router that only chooses"
            )
        if isinstance(router, Router):
            if capacity is not None and declared_tags(type(router)) & {"axes", "gates"}:
                raise UserError(
                    f"{_name(router)} chooses rows and columns of a grid of experts, which have no queues of "
                    "their own, so it takes no capacity; leave capacity out"
                )
            router.require_pool(len(experts.members) if isinstance(experts, ExpertPool) else 1)
        self.router = router
        self.experts = experts
        self.shared = shared
        self.capacity = capacity
        self.adds_losses = adds_losses

    def forward(
        self,
        inputs: RouterInput,
        ties: Float[Tensor, "E E"] | None = None,
        values: Float[Tensor, "T D"] | None = None,
    ) -> tuple[Float[Tensor, "T D"], Routing]:
        """What the layer adds to each token, and the routing for balancers and the next layer.

        With ``ties`` an expert's weight is multiplied by how much it is tied to the token's experts: the mean
        over them, itself among them, of ``sigmoid(ties[expert, other])``. With ``values`` the experts read
        these in place of the tokens that the router reads.

        Raises:
            UserError: tokens are decoded with a method that needs the tokens to come, or experts of a mixer,
                which weighs them itself, are tied.
        """
        require_decodable(self.router, inputs)
        values = inputs.x if values is None else values
        output, routing = self._routed(inputs, ties, values)
        if routing.extra is not None:
            output = output + routing.extra.to(output.dtype)
        if self.shared is not None:
            output = output + torch.where(inputs.valid[:, None], self.shared(values), 0.0)
        return output, routing

    def _routed(self, inputs: RouterInput, ties: Tensor | None, values: Tensor) -> tuple[Tensor, Routing]:
        own, theirs = _split(inputs.history)
        handle = self.experts.matrices if uses_experts(self.router) else None
        told = replace(inputs, history=own)
        if isinstance(self.router, Mixer):
            if ties is not None:
                raise UserError(f"{type(self.router).__name__} weighs experts itself; leave ties out")
            output, routing = self.router(told, handle)
            return output, self._with_experts(routing, {}, inputs.training)
        if inputs.experts is None:
            told = replace(told, experts=handle)
        routing = self.router(told)
        if self.capacity is not None and inputs.may_look_ahead:
            routing = self.capacity.apply(routing)
        if ties is not None:
            routing = _tied(routing, ties)
        if routing.modulation is not None:
            values = (exact(values) * exact(routing.modulation)).to(values.dtype)
        output, history = self.experts.computed(values, routing, replace(inputs, history=theirs), handle)
        return output, self._with_experts(routing, history, inputs.training)

    def _with_experts(self, routing: Routing, history: Mapping[str, Tensor], training: bool) -> Routing:
        """The routing with what experts remember and, in training, with their losses."""
        kept = {f"{_EXPERTS}{name}": value for name, value in history.items()}
        losses: dict[str, Tensor] = {}
        if training and self.adds_losses:
            # A pool's other members are the own experts of other layers, which add theirs.
            own = self.experts if isinstance(self.experts, Experts) else self.experts.banks[0]
            losses = {f"{_EXPERTS}{name}": value for name, value in own.bank.losses().items()}
        if not kept and not losses:
            return routing
        return replace(routing, history={**routing.history, **kept}, losses={**routing.losses, **losses})


def _fit(router: Router | Mixer, shape: LayerShape) -> bool:
    """Whether sizes are the same; experts behind a router that serves all layers may differ in width."""
    if isinstance(router, Router) and "shared" in declared_tags(type(router)):
        return (router.shape.d_model, router.shape.num_experts) == (shape.d_model, shape.num_experts)
    return router.shape == shape


def uses_experts(router: Router | Mixer) -> bool:
    """Whether what decides in a layer runs or reads its experts."""
    return isinstance(router, Mixer) or "reads:experts" in declared_tags(type(router))


def _split(history: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a layer remembers, as the router's own and as its experts'."""
    own = {name: value for name, value in history.items() if not name.startswith(_EXPERTS)}
    theirs = {name.removeprefix(_EXPERTS): history[name] for name in history if name not in own}
    return own, theirs


def _name(method: object) -> str:
    return type(method).__name__


def _tied(routing: Routing, ties: Float[Tensor, "E E"]) -> Routing:
    """The routing with each weight multiplied by the mean strength of the expert's ties to the token's."""
    strengths = ties.sigmoid()
    places = routing.token_ids, routing.expert_ids
    chosen = strengths.new_zeros(routing.scores.shape)
    chosen = chosen.index_put(places, chosen.new_ones(()))
    with torch.autocast(strengths.device.type, enabled=False):
        summed = chosen @ strengths.T
    mean = summed / chosen.sum(-1, keepdim=True).clamp(min=1)
    return replace(routing, weights=routing.weights * mean[places].to(routing.weights))


def require_decodable(router: Router | Mixer, inputs: RouterInput) -> None:
    """Refuse to decode with a method whose choices for a token depend on tokens that are yet to come.

    Raises:
        UserError: ``inputs.decoding`` and the method looks ahead and has no causal rule for inference.
    """
    tags = declared_tags(type(router))
    if inputs.decoding and "looks_ahead" in tags and "causal_inference" not in tags:
        raise UserError(
            f"{type(router).__name__} needs a sequence's later tokens to decide, so it cannot generate text; "
            "use it where whole sequences are given, or choose a method without the tag looks_ahead"
        )
