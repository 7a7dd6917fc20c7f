"""One MoE layer of our own: a router or mixer, experts, and the sum of what they return.

Layers share by holding the same module: one `Experts` in several layers is a common pool, one router
in several layers decides in all of them, and an `ExpertPool` lets a layer reach the experts of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UnknownNameError, UserError, check_range
from mixtura.kernels import routed_experts
from mixtura.methods import declared_tags
from mixtura.methods._capacity import Order, Overflow, limit, room
from mixtura.methods.mixers import Mixer
from mixtura.methods.routers import Router
from mixtura.types import LayerShape, RouterInput, Routing


def swiglu(features: Float[Tensor, "*n F2"]) -> Float[Tensor, "*n F"]:
    """``silu(gate) * up``, where the first half of the features is the gate and the second is up."""
    gate, up = features.chunk(2, dim=-1)
    return F.silu(gate) * up


@final
@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """Experts made of plain tensors: an `ExpertsHandle`, and what every module of experts computes with.

    Expert e computes ``down[e] @ activation(gate_up[e] @ x)``. With the default activation the upper
    half of ``gate_up [E, 2F, D]`` is the gate; with another, ``gated`` says whether there is one.
    """

    gate_up: Float[Tensor, "E R D"]
    down: Float[Tensor, "E D F"]
    activation: Callable[[Tensor], Tensor] = swiglu
    gated: bool = True

    @property
    def shape(self) -> LayerShape:
        """Sizes, read from the tensors."""
        num_experts, d_model, d_expert = self.down.shape
        return LayerShape(d_model=d_model, d_expert=d_expert, num_experts=num_experts)

    @property
    def gate(self) -> Float[Tensor, "E F D"] | None:
        """A view of the gate matrices."""
        return self.gate_up[:, : self.down.shape[2]] if self.gated else None

    @property
    def up(self) -> Float[Tensor, "E F D"]:
        """A view of the up matrices."""
        return self.gate_up[:, -self.down.shape[2] :]

    def run(
        self, x: Float[Tensor, "T D"], token_ids: Int[Tensor, " N"], expert_ids: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Row i is expert ``expert_ids[i]`` of ``x[token_ids[i]]``, not weighted."""
        rows = torch.arange(token_ids.shape[0], device=x.device)
        ones = torch.ones_like(rows, dtype=x.dtype)
        return self.weighted(x[token_ids], rows, expert_ids, ones)

    def weighted(
        self,
        x: Float[Tensor, "T D"],
        token_ids: Int[Tensor, " N"],
        expert_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; zero for a token without an expert."""
        return routed_experts(
            x, token_ids, expert_ids, weights, self.gate_up, self.down, activation=self.activation
        )

    def merged(self, mix: Float[Tensor, "G E"]) -> ExpertMatrices:
        """G experts, each the sum of these weighted by a row of ``mix``."""
        gate_up = torch.einsum("ge,erd->grd", mix.to(self.gate_up.dtype), self.gate_up)
        down = torch.einsum("ge,edf->gdf", mix.to(self.down.dtype), self.down)
        return replace(self, gate_up=gate_up, down=down)


@final
class Experts(nn.Module):
    """Gated experts, stored as transformers stores them.

    Expert e computes ``down_proj[e] @ (silu(gate) * up)`` with gate and up the halves of
    ``gate_up_proj[e] @ x``. Parameters: ``gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``,
    drawn from the layer's own ``seed``.
    """

    def __init__(self, shape: LayerShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.gate_up_proj = _drawn((shape.num_experts, 2 * shape.d_expert, shape.d_model), generator)
        self.down_proj = _drawn((shape.num_experts, shape.d_model, shape.d_expert), generator)

    @property
    def matrices(self) -> ExpertMatrices:
        """The experts as tensors, to run, read or merge."""
        return ExpertMatrices(self.gate_up_proj, self.down_proj)

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; zero for a token without an expert."""
        return self.matrices.weighted(x, routing.token_ids, routing.expert_ids, routing.weights)


@final
class ExpertPool(nn.Module):
    """The experts of several layers as those of one: what a router may reuse from its neighbours.

    The experts of ``members[0]`` come first, and so on. The members are shared with the layers they
    belong to: the same modules, not copies.

    >>> shape = LayerShape(d_model=8, d_expert=16, num_experts=4)
    >>> ExpertPool([Experts(shape, seed=0), Experts(shape, seed=1)]).shape.num_experts
    8
    """

    def __init__(self, members: Sequence[Experts]) -> None:
        super().__init__()
        widths = {(member.shape.d_model, member.shape.d_expert) for member in members}
        if len(widths) != 1:
            raise UserError(
                "experts of one pool must all have the same widths, "
                f"got {sorted(widths)} as (d_model, d_expert)"
            )
        self.members = nn.ModuleList(members)
        first = members[0].shape
        total = sum(member.shape.num_experts for member in members)
        self.shape = LayerShape(first.d_model, first.d_expert, total)

    @property
    def matrices(self) -> ExpertMatrices:
        """All members' experts as tensors."""
        parts = [member.matrices for member in self.members if isinstance(member, Experts)]
        return ExpertMatrices(
            torch.cat([part.gate_up for part in parts]), torch.cat([part.down for part in parts])
        )

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; only chosen experts are computed."""
        output = torch.zeros_like(x)
        start = 0
        for member in self.members:
            assert isinstance(member, Experts)
            local = routing.expert_ids - start
            start += member.shape.num_experts
            # Ids of other members lie outside this one's and are absent to it.
            output = output + member.matrices.weighted(x, routing.token_ids, local, routing.weights)
        return output


@final
class SharedExpert(nn.Module):
    """An expert that every token visits, beside those it is routed to.

    With ``gated`` its output is multiplied by a sigmoid of the token's product with a vector.
    """

    def __init__(self, d_model: int, d_expert: int, *, gated: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.experts = Experts(LayerShape(d_model, d_expert, 1), seed=seed)
        self.gate = _drawn((1, 1, d_model), torch.Generator().manual_seed(seed + 1)) if gated else None

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The expert's output for every token."""
        own = self.experts.matrices
        output = F.linear(swiglu(F.linear(x, own.gate_up[0])), own.down[0])
        return output if self.gate is None else torch.sigmoid(F.linear(x, self.gate[0])) * output


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

    Raises:
        UserError: router and experts are of different sizes, the router is set for a pool of another size,
            or a mixer is given a capacity.
    """

    def __init__(
        self,
        router: Router | Mixer,
        experts: Experts | ExpertPool,
        *,
        shared: SharedExpert | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        if router.shape != experts.shape:
            raise UserError(
                f"the router is made for {router.shape}, the experts are {experts.shape}; "
                "make both of one shape"
            )
        if capacity is not None and isinstance(router, Mixer):
            raise UserError("a mixer sends no token anywhere, so it takes no capacity; leave capacity out")
        if isinstance(router, Router):
            router.require_pool(len(experts.members) if isinstance(experts, ExpertPool) else 1)
        self.router = router
        self.experts = experts
        self.shared = shared
        self.capacity = capacity

    def forward(
        self, inputs: RouterInput, ties: Float[Tensor, "E E"] | None = None
    ) -> tuple[Float[Tensor, "T D"], Routing]:
        """What the layer adds to each token, and the routing for balancers and the next layer.

        With ``ties`` an expert's weight is multiplied by how much it is tied to the token's experts: the mean
        over them, itself among them, of ``sigmoid(ties[expert, other])``.

        Raises:
            UserError: tokens are decoded with a method that needs the tokens to come, or experts of a mixer,
                which weighs them itself, are tied.
        """
        require_decodable(self.router, inputs)
        output, routing = self._routed(inputs, ties)
        if routing.extra is not None:
            output = output + routing.extra.to(output.dtype)
        if self.shared is not None:
            output = output + torch.where(inputs.valid[:, None], self.shared(inputs.x), 0.0)
        return output, routing

    def _routed(self, inputs: RouterInput, ties: Tensor | None) -> tuple[Tensor, Routing]:
        if isinstance(self.router, Mixer):
            if ties is not None:
                raise UserError(f"{type(self.router).__name__} weighs experts itself; leave ties out")
            mixed: tuple[Tensor, Routing] = self.router(inputs, self._handle())
            return mixed
        if inputs.experts is None and "reads:experts" in declared_tags(type(self.router)):
            inputs = replace(inputs, experts=self._handle())
        routing: Routing = self.router(inputs)
        if self.capacity is not None and inputs.may_look_ahead:
            routing = self.capacity.apply(routing)
        if ties is not None:
            routing = _tied(routing, ties)
        output: Tensor = self.experts(inputs.x, routing)
        return output, routing

    def _handle(self) -> ExpertMatrices:
        matrices: ExpertMatrices = self.experts.matrices
        return matrices


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


def _drawn(shape: tuple[int, int, int], generator: torch.Generator) -> nn.Parameter:
    """Matrices from a normal distribution whose variance is one over their inputs."""
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return nn.Parameter(drawn / shape[-1] ** 0.5)
