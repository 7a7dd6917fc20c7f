"""Making the MoE layers of a model from their plans, with what layers share shared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods import create, declared_tags
from mixtura.methods.balancers import Balancer
from mixtura.methods.experts import Bank
from mixtura.methods.forms import Form
from mixtura.methods.mixers import Mixer
from mixtura.methods.routers import Router
from mixtura.modeling.experts import ExpertPool, Experts, SharedExpert
from mixtura.modeling.forming import FormedLayer, passes_of
from mixtura.modeling.layer import MoELayer
from mixtura.modeling.plan import Choice, MoEPlan
from mixtura.modeling.seeds import FORM, part_seed
from mixtura.modeling.suiting import Decider, require_suited
from mixtura.types import LayerShape

Block = MoELayer | FormedLayer


def make_layers(
    plans: Sequence[MoEPlan | None], d_model: int, seed: int, deviation: float
) -> tuple[Block | None, ...]:
    """The MoE layer of every decoder layer; None for dense ones.

    Experts' weights have the standard ``deviation``, as the model's other matrices do: much wider, and what
    untrained experts put out would drown the tokens. Routers draw theirs as each method says.

    Raises:
        UserError: layers of a pool have experts of different widths, or parts do not fit each other.
    """
    maker = _Maker(plans, d_model, seed, deviation)
    return tuple(None if plan is None else maker.block(layer, plan) for layer, plan in enumerate(plans))


@final
class _Maker:
    """Makes the layers of one model, in order, and knows what they share."""

    def __init__(self, plans: Sequence[MoEPlan | None], d_model: int, seed: int, deviation: float) -> None:
        self._plans, self._d_model, self._seed, self._deviation = plans, d_model, seed, deviation
        self._routers: dict[str, Router | Mixer] = {}
        self._num_moe = sum(plan is not None for plan in plans)
        self._first = [
            None if plan is None else self._experts(layer, plan, 0) for layer, plan in enumerate(plans)
        ]

    def block(self, layer: int, plan: MoEPlan) -> Block:
        """One layer: a pass, or the passes of its form."""
        if plan.form is None:
            return self._pass(layer, plan, 0, _pool(self._first, self._plans, layer, plan.pool))
        if plan.pool != 1:
            raise UserError(
                f"the form {plan.form.name} has passes of its own, whose experts belong to no pool; leave "
                "out form or pool"
            )
        shape = plan.shape(self._d_model)
        values = plan.form.with_defaults("forms", seed=part_seed(self._seed, layer, FORM))
        form: Form = create("forms", plan.form.name, shape, **values)
        form.rescale(self._deviation)
        first = self._first[layer]
        assert first is not None
        passes: list[MoELayer] = []
        for turn in range(form.num_passes):
            own = first if turn == 0 or form.share == "experts" else self._experts(layer, plan, turn)
            shared = passes[0].shared if passes and form.share == "experts" else None
            passes.append(self._pass(layer, plan, turn, own, shared))
        return FormedLayer(form, passes)

    def _pass(
        self,
        layer: int,
        plan: MoEPlan,
        turn: int,
        experts: Experts | ExpertPool,
        shared: SharedExpert | None = None,
    ) -> MoELayer:
        seed = part_seed(self._seed, layer, "router", turn)
        router = _router(plan, experts.shape, seed, self._num_moe, self._routers)
        if plan.shared_width and shared is None:
            drawn = part_seed(self._seed, layer, "shared", turn)
            how = {"gated": plan.shared_gated, "frozen": plan.shared_frozen}
            shared = SharedExpert(self._d_model, plan.shared_width, **how, seed=drawn)
            shared.experts.bank.rescale(self._deviation)
        # Passes that share experts share their losses, too.
        adds = turn == 0 or isinstance(experts, ExpertPool) or experts is not self._first[layer]
        return MoELayer(router, experts, shared=shared, capacity=plan.capacity, adds_losses=adds)

    def _experts(self, layer: int, plan: MoEPlan, turn: int) -> Experts:
        seed = part_seed(self._seed, layer, "experts", turn)
        values = plan.experts.with_defaults("experts", seed=seed)
        bank: Bank = create("experts", plan.experts.name, plan.shape(self._d_model), **values)
        bank.rescale(self._deviation)
        return Experts(bank)


def _pool(
    experts: Sequence[Experts | None], plans: Sequence[MoEPlan | None], layer: int, size: int
) -> Experts | ExpertPool:
    """The experts a layer reaches: its own, then those of the rest of its group of adjacent MoE layers."""
    own = experts[layer]
    assert own is not None
    if size == 1:
        return own
    order = [place for place, one in enumerate(plans) if one is not None]
    first = order.index(layer) // size * size
    group = [one for place in order[first : first + size] if (one := experts[place]) is not None]
    if len(group) != size:
        raise UserError(
            f"a pool of {size} layers does not divide {len(order)} MoE layers; choose one that does"
        )
    return ExpertPool([own, *(one for one in group if one is not own)])


def _router(
    plan: MoEPlan, shape: LayerShape, seed: int, num_layers: int, shared: dict[str, Router | Mixer]
) -> Router | Mixer:
    choice, kind = (plan.router, "routers") if plan.mixer is None else (plan.mixer, "mixers")
    assert choice is not None
    if "shared" not in declared_tags(choice.method(kind)):
        values = choice.with_defaults(kind, seed=seed, reuse=plan.pool)
        made: Router | Mixer = create(kind, choice.name, shape, **values)
        return made
    # How wide a layer's experts are is nothing that one instance for all layers could go by.
    size = [shape.d_model, shape.num_experts]
    key = json.dumps([kind, choice.name, dict(choice.settings), size], sort_keys=True)
    if key not in shared:
        values = choice.with_defaults(kind, seed=seed, num_layers=num_layers)
        shared[key] = create(kind, choice.name, shape, **values)
    return shared[key]


def make_balancers(
    plan: MoEPlan, router: Router | Mixer, bank: Bank | None = None
) -> tuple[tuple[Balancer, ...], ...]:
    """The balancers of a pass; where experts lie on a grid those of its rows, then those of its columns.

    Raises:
        UserError: one does not suit the router or mixer, or the experts.
    """
    has_rows = expert_rows(router) is not None
    made: list[tuple[Balancer, ...]] = []
    for shape in axes_of(router):
        decider = Decider(
            method=type(router), shape=shape, has_rows=has_rows, bank=None if bank is None else type(bank)
        )
        made.append(tuple(_balancer(one, decider) for one in plan.balancers))
    return tuple(made)


def _balancer(choice: Choice, decider: Decider) -> Balancer:
    """A balancer that suits what decides; one that does not is refused with its name."""
    made: Balancer = create("balancers", choice.name, **dict(choice.settings))
    try:
        require_suited(made, decider)
    except UserError as error:
        if choice.name in str(error):
            raise
        # Of a grid it sees rows, then columns, which are fewer than the layer's experts.
        raise UserError(
            f"the balancer {choice.name} does not suit the {decider.shape.num_experts} rows or columns "
            f"of a grid that it would see: {error}"
        ) from None
    return made


def axes_of(router: Router | Mixer) -> tuple[LayerShape, ...]:
    """What balancers of a layer see as experts: see `Router.axes`."""
    return router.axes if isinstance(router, Router) else (router.shape,)


def expert_rows(router: Router | Mixer) -> Float[Tensor, "E D"] | None:
    """The rows whose products with a token are its experts' logits; None where a method has none such."""
    if not declared_tags(type(router)) & {"expert_rows", "keeps_weights"}:
        return None
    rows: Tensor = router.get_parameter("weight")
    return rows


def tags_of(layer: Any) -> frozenset[str]:
    """The tags of what a layer is made of, routers or mixers, experts and form; none for a dense layer."""
    parts: list[nn.Module] = [part for one in passes_of(layer) for part in (one.router, bank_of(one))]
    if isinstance(layer, FormedLayer):
        parts.append(layer.form)
    return frozenset().union(*(declared_tags(type(part)) for part in parts))


def bank_of(layer: MoELayer) -> Bank:
    """The experts of a pass; those of a pool are all of one kind, so its first member's."""
    experts = layer.experts.banks[0] if isinstance(layer.experts, ExpertPool) else layer.experts
    assert isinstance(experts, Experts)
    return experts.bank
