"""What stands in for the forward of a router module, and how another router is run in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.checkpoints.view import MemoryLayer
from mixtura.checkpoints.viewing.wrappers import submodule
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.kernels.backend import NAME as BACKEND
from mixtura.machine.releases import CHECKPOINTING, in_order_of, logits_weights_choices
from mixtura.methods import declared_tags
from mixtura.methods.routers import Router
from mixtura.modeling.balance import LayerBalance
from mixtura.modeling.layer import require_decodable
from mixtura.rerouting.choices import padded
from mixtura.rerouting.experts import experts_of
from mixtura.rerouting.inside import Inside, Outline
from mixtura.rerouting.passes import Pass, Passes, Seen
from mixtura.rerouting.thinning import normalizes, require_ranks, thinned
from mixtura.types import RouterInput, Routing
from mixtura.types.steering import Steering

NO_GRADIENT = (
    "{} has no gradient, because activation checkpointing runs layers without; "
    f'use {CHECKPOINTING}_kwargs={{{{"use_reentrant": False}}}}'
)
ROUTER = "mixtura_router"
BALANCE = "mixtura_balance"
_AS_IT_IS = Steering()
# Families whose routers divide weights by K, which their blocks multiply outputs by.
_DIVIDED_BY_TOP_K = ("openai_privacy_filter",)
# How families call what they multiply a token's weights by, after any normalisation.
_SCALES = ("routed_scaling_factor", "route_scale", "router_scaling_factor")


@final
@dataclass(slots=True, eq=False)
class Clock:
    """Optimizer steps done so far, and what noise is drawn from."""

    step: int = 0
    seed: int = 0


class _Decision(NamedTuple):
    """What a router decided: its routing, and each token's experts and weights as the family writes them."""

    routing: Routing
    ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]


@final
class Seat:
    """Stands in for the forward of the router of one MoE layer; does as that router did until told otherwise.

    It is an attribute of the router module itself, which stays where it is with its weights, hooks and
    class, so that everything that looks for it (``output_router_logits``, saving, PEFT) finds it.
    """

    def __init__(self, layer: MemoryLayer, place: int, passes: Passes, clock: Clock) -> None:
        self.layer = layer
        self.place = place
        self.gate: Any = layer.router
        self.passes = passes
        self.clock = clock
        self.keeps_correction = False
        self._extra: Tensor | None = None
        self._normalizes: bool | None = None
        self._outline = Outline(
            matrix=_two(self.matrix),
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            num_groups=layer.num_groups,
            top_groups=layer.top_groups,
        )
        self.sit()

    def sit(self) -> None:
        """Stand in for the router's forward."""
        self._own = vars(self.gate).get("forward")
        self._adding = self.layer.experts.register_forward_hook(self._add_extra)
        self.gate.forward = self

    def remove(self) -> None:
        """Give the router module its own forward back, and let go of what was set here."""
        for name in (ROUTER, BALANCE):
            if hasattr(self.gate, name):
                delattr(self.gate, name)
        self.stand()

    def stand(self) -> None:
        """Give the router module its own forward back, until `sit`.

        Raises:
            UserError: somebody else has wrapped it since.
        """
        self._adding.remove()
        own = self._own
        if vars(self.gate).get("forward") is self:
            if own is None:
                del self.gate.forward
            else:
                self.gate.forward = own
        elif vars(self.gate).get("_old_forward") is self:
            # Offloaded since: what brings the parameters wraps this now, and has to wrap the own one again.
            self.gate._old_forward = MethodType(type(self.gate).forward, self.gate) if own is None else own
        else:
            raise UserError(
                f"the forward of {type(self.gate).__name__} of layer {self.layer.index} was wrapped after "
                "its routing was changed; take that back first"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        """A copy of the whole model is a model of its own; a router cannot be copied out of it.

        Raises:
            UserError: only a part of the model is copied, as PEFT does for ``modules_to_save``.
        """
        if id(self.layer._model) not in memo:
            raise UserError(
                f"{type(self.gate).__name__} of layer {self.layer.index} is copied out of its model, where "
                "nothing could balance or replay it; wrap the model for adapters first, then change its "
                "routing"
            )
        copied = Seat.__new__(Seat)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def reads(self, name: str) -> bool:
        """Whether the router that was set here reads a field of `RouterInput`."""
        return f"reads:{name}" in declared_tags(type(self.router))

    @property
    def router(self) -> Router | None:
        """The router that decides here; None for the family's own."""
        found = getattr(self.gate, ROUTER, None)
        return found if isinstance(found, Router) else None

    @property
    def balance(self) -> LayerBalance | None:
        """The balancers of this layer and their states."""
        found = getattr(self.gate, BALANCE, None)
        return found if isinstance(found, LayerBalance) else None

    @property
    def width(self) -> int:
        """The number of features that the family's router multiplies with its matrix."""
        return self._outline.matrix[1]

    @property
    def bias(self) -> Float[Tensor, " E"] | None:
        """The bias of the family's own product; None where it has none."""
        name = self.layer.site.router_weight.rpartition(".")[0] + ".bias"
        owner, _, leaf = name.rpartition(".")
        found = getattr(submodule(self.layer._model, owner), leaf, None)
        return found if isinstance(found, Tensor) else None

    @property
    def device(self) -> torch.device:
        """Where the router runs, also where its parameters are brought for that only.

        Raises:
            UnsupportedModelError: it is nowhere: the model has no weights.
        """
        for module in self.gate.modules():
            hook = getattr(module, "_hf_hook", None)
            devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
            if (found := next((device for device in devices if device is not None), None)) is not None:
                return torch.device(found)
        if self.matrix.is_meta:
            raise UnsupportedModelError(
                f"{type(self.gate).__name__} of layer {self.layer.index} has no weights (they are on the "
                "meta device) and nothing that would bring them; load the model first"
            )
        return self.matrix.device

    @property
    def matrix(self) -> Tensor:
        """The family's own router matrix; a placeholder where it is offloaded or sharded."""
        owner, _, leaf = self.layer.site.router_weight.rpartition(".")
        found = getattr(submodule(self.layer._model, owner), leaf)
        assert isinstance(found, Tensor)
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the router module returns."""
        here = self.passes.of(self.gate)
        if self.passes.active is here and here.training and not torch.is_grad_enabled():
            here.without_gradient = True
        steering, router = self._steering(here), self.router
        if router is None and steering.idle and not here.collecting:
            return self._run(*args, **kwargs)
        decided: list[_Decision] = []

        def decide(features: Tensor, matrix: Tensor) -> None:
            # Not after the router's forward: what offloads or shards its parameters has them back by then.
            assert router is not None
            decided.append(self._decide(router, features, matrix, here))

        with Inside(self._outline, steering, None if router is None else decide) as inside:
            output = self._run(*args, **kwargs)
        if router is not None:
            return self._replaced(decided, output, here)
        self._require_steered(inside, steering)
        if steering.changes_weights:
            output = self._thinned(output, steering, here)
        if here.collecting and self.passes.active is here and inside.logits is not None:
            # Bare references: anything computed from them here would be missing when this is computed again.
            _, weights, choices = logits_weights_choices(output)
            here.seen[self.layer.index] = Seen(inside.logits, weights, choices)
        return output

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self.gate).forward(self.gate, *args, **kwargs)

    def _steering(self, here: Pass) -> Steering:
        # A table of token ids chooses the same experts every time.
        if self.layer.hash_routed:
            return _AS_IT_IS
        forced = here.forced.get(self.layer.index)
        balance = self.balance
        if balance is None or self.router is not None:
            asked = here.steering.get(self.layer.index, _AS_IT_IS)
            return asked if forced is None else replace(asked, forced=forced)
        # Where the family has a correction bias of its own, that one is balanced.
        bias = balance.bias if self.layer.site.correction_bias is None else None
        allowed = balance.allowed if here.training else None
        return Steering(bias=bias, allowed=allowed, forced=forced)

    def _thinned(self, output: Any, steering: Steering, here: Pass) -> Any:
        """What the router returned, without the experts that are left out and with weights as asked."""
        if self._normalizes is None:
            self._normalizes = normalizes(self.gate, self._run, self.width, self.matrix.dtype)
        count, known = self.layer.num_experts, self._normalizes
        require_ranks(output, steering, self.layer.top_k, count)
        # Other implementations of experts run every number they are given.
        experts: Any = self.layer.experts
        absent = experts.config._experts_implementation == BACKEND
        changed, kept = thinned(output, steering, count, normalizes=known, absent=absent)
        if kept is not None:
            here.kept[self.layer.index] = kept
        return changed

    def _require_steered(self, inside: Inside, steering: Steering) -> None:
        if steering.changes_logits and inside.logits is None:
            raise UnsupportedModelError(
                f"{type(self.gate).__name__} of layer {self.layer.index} scores experts by no product, so "
                "that its scores cannot be steered"
            )
        if steering.changes_choice and inside.num_choices != 1:
            raise UnsupportedModelError(
                f"{type(self.gate).__name__} of layer {self.layer.index} does not choose experts by their "
                "scores in one step, so its choice can be neither biased nor replayed; set_router puts "
                "another router in its place"
            )

    def _decide(self, router: Router, features: Tensor, matrix: Tensor, here: Pass) -> _Decision:
        """What ``router`` decides, its weights multiplied by what the family multiplies its own by."""
        rows = features.reshape(-1, self.width)
        with self._lent(router, matrix):
            if "keeps_weights" in declared_tags(type(router)) and self.bias is not None:
                rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
            routing = router(self._input(router, rows, here))
        if routing.state is not None:
            if here.without_gradient:
                raise UserError(NO_GRADIENT.format(f"the state that {type(router).__name__} hands on"))
            here.states[self.place] = routing.state
        self._extra = routing.extra
        ids, weights = padded(routing)
        return _Decision(routing, ids, self._scaled(weights, ids))

    def _replaced(self, decided: list[_Decision], output: tuple[Any, ...], here: Pass) -> Any:
        """What the family's router would return had it decided so."""
        if not decided:
            raise UnsupportedModelError(
                f"{type(self.gate).__name__} of layer {self.layer.index} does not score experts by a product"
            )
        ((routing, ids, weights),) = decided
        if here.collecting and self.passes.active is here:
            here.seen[self.layer.index] = Seen(routing=routing)
        own_logits, own_weights, _ = logits_weights_choices(output)
        logits = routing.logits.to((own_weights if own_logits is None else own_logits).dtype)
        return in_order_of(output, logits, weights.to(own_weights.dtype), ids)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add_extra(self, experts: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The experts' output, with the branch that the router has just added."""
        extra, self._extra = self._extra, None
        if extra is None:
            return output
        if extra.shape[-1] != output.shape[-1]:
            raise UnsupportedModelError(
                f"{type(self.router).__name__} adds {extra.shape[-1]} features to an output of "
                f"{output.shape[-1]}, because {type(self.gate).__name__} routes on others; choose another"
            )
        return output + extra.view_as(output).to(output.dtype)

    @contextmanager
    def _lent(self, router: Router, matrix: Tensor) -> Iterator[None]:
        """For one call the router's ``weight`` is the family's own matrix, with its bias as a last column."""
        if "keeps_weights" not in declared_tags(type(router)):
            yield
            return
        num_experts = self.layer.num_experts
        weight = matrix[:num_experts]
        if self.bias is not None:
            weight = torch.cat([weight, self.bias[:num_experts, None]], dim=1)
        router.__dict__["weight"] = weight
        try:
            yield
        finally:
            del router.__dict__["weight"]

    def _input(self, router: Router, features: Float[Tensor, "T D"], here: Pass) -> RouterInput:
        tags = declared_tags(type(router))
        known = here.rows(features.shape[0])
        valid = features.new_ones(features.shape[0], dtype=torch.bool)
        if known is not None and known.valid is not None:
            valid = known.valid
        fields: dict[str, Any] = {
            "layer": self.place,
            "step": self.clock.step,
            "training": here.training,
            "causal": self._causal(),
            "decoding": here.past > 0,
            "state": here.states.get(self.place - 1),
        }
        if known is not None:
            fields |= {name: getattr(known, name) for name in ("sequence_ids", "positions", "token_ids")}
        if here.training:
            mixed = hash((self.clock.seed, here.number, self.place)) % (1 << 62)
            fields["generator"] = torch.Generator().manual_seed(mixed)
        fields["selection_bias"] = self._selection_bias()
        balance = self.balance
        if balance is not None and balance.allowed is not None and here.training:
            fields["allowed"] = balance.allowed.expand(features.shape[0], -1)
        if "reads:experts" in tags:
            fields["experts"] = experts_of(self.layer)
        asked = {name: value for name, value in fields.items() if f"reads:{name}" in tags}
        inputs = RouterInput(x=features, valid=valid, **asked)
        require_decodable(router, RouterInput(x=features, valid=valid, decoding=here.past > 0))
        return inputs

    def _selection_bias(self) -> Float[Tensor, " E"] | None:
        """What balancing adds to scores, and the family's own correction where scores are of its kind."""
        learned = None if self.balance is None else self.balance.bias
        held = self.layer.correction_bias() if self.keeps_correction else None
        if learned is None or held is None:
            return learned if held is None else held
        return learned + held.to(learned)

    def _causal(self) -> bool:
        model: Any = self.layer._model
        return bool(model.can_generate()) if hasattr(model, "can_generate") else True

    @torch.no_grad()
    def compares_sigmoids(self, router: Router) -> bool:
        """Whether a router compares experts by sigmoids, which such a family's correction bias is for."""
        nothing = torch.zeros(1, router.shape.d_model, dtype=self.matrix.dtype, device=self.device)
        # Nothing times whatever matrix is nothing.
        matrix = torch.zeros(self._outline.matrix, dtype=self.matrix.dtype, device=self.device)
        try:
            with self._lent(router, matrix):
                routing = router(RouterInput.of(nothing))
        except UserError:
            return False
        return router.shape.num_experts > 2 and bool((routing.scores == 0.5).all())

    def _scaled(self, weights: Float[Tensor, "T K"], ids: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """The weights, multiplied by what the family multiplies its own by."""
        for name in _SCALES:
            factor = getattr(self.gate, name, None)
            if isinstance(factor, int | float):
                weights = weights * factor
        if getattr(self.layer.experts.config, "model_type", "") in _DIVIDED_BY_TOP_K:
            weights = weights / self.layer.top_k
        each = getattr(self.gate, "per_expert_scale", None)
        if isinstance(each, Tensor):
            weights = weights * each[ids.clamp(max=len(each) - 1)]
        return weights


def _two(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns
