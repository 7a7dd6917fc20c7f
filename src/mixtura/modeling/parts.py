"""Making the MoE layers of a model from their plans, with what layers share shared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods import create, declared_tags
from mixtura.methods.balancers import Balancer
from mixtura.methods.mixers import Mixer
from mixtura.methods.routers import Router
from mixtura.modeling.layer import ExpertPool, Experts, MoELayer, SharedExpert
from mixtura.modeling.plan import MoEPlan
from mixtura.modeling.suiting import Decider, require_suited
from mixtura.types import LayerShape

# What seeds of parts are counted from, so that no two parts of a model draw the same numbers.
_PARTS = {"router": 1, "experts": 2, "shared": 3, "balancer": 4}
_STRIDE = 1_000_003


def part_seed(seed: int, layer: int, part: str) -> int:
    """The seed of one part of one layer, from the model's."""
    return (seed * _STRIDE + layer * len(_PARTS) + _PARTS[part]) % (1 << 31)


def make_layers(
    plans: Sequence[MoEPlan | None], d_model: int, seed: int, deviation: float
) -> tuple[MoELayer | None, ...]:
    """The MoE layer of every decoder layer; None for dense ones.

    Experts' weights have the standard ``deviation``, as the model's other matrices do: much wider, and what
    untrained experts put out would drown the tokens. Routers draw theirs as each method says.

    Raises:
        UserError: layers of a pool have experts of different widths, or parts do not fit each other.
    """
    experts = [
        None if plan is None else Experts(plan.shape(d_model), seed=part_seed(seed, layer, "experts"))
        for layer, plan in enumerate(plans)
    ]
    for one in experts:
        _scale(one, deviation)
    shared_routers: dict[str, Router | Mixer] = {}
    num_moe = sum(plan is not None for plan in plans)
    made: list[MoELayer | None] = []
    for layer, plan in enumerate(plans):
        if plan is None:
            made.append(None)
            continue
        pool = _pool(experts, plans, layer, plan.pool)
        router = _router(plan, pool.shape, part_seed(seed, layer, "router"), num_moe, shared_routers)
        shared = None
        if plan.shared_width:
            drawn = part_seed(seed, layer, "shared")
            shared = SharedExpert(d_model, plan.shared_width, gated=plan.shared_gated, seed=drawn)
            _scale(shared.experts, deviation)
        made.append(MoELayer(router, pool, shared=shared, capacity=plan.capacity))
    return tuple(made)


@torch.no_grad()
def _scale(experts: Experts | None, deviation: float) -> None:
    """From a variance of one over a matrix's inputs, as experts are drawn, to a common deviation."""
    if experts is not None:
        for matrix in (experts.gate_up_proj, experts.down_proj):
            matrix.mul_(deviation * matrix.shape[-1] ** 0.5)


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
    key = json.dumps([kind, choice.name, dict(choice.settings), str(shape)], sort_keys=True)
    if key not in shared:
        values = choice.with_defaults(kind, seed=seed, num_layers=num_layers)
        shared[key] = create(kind, choice.name, shape, **values)
    return shared[key]


def make_balancers(plan: MoEPlan, router: Router | Mixer) -> tuple[Balancer, ...]:
    """The balancers of a layer.

    Raises:
        UserError: one does not suit the router or mixer.
    """
    has_rows = expert_rows(router) is not None
    decider = Decider(method=type(router), shape=router.shape, has_rows=has_rows)
    made: list[Balancer] = [create("balancers", one.name, **dict(one.settings)) for one in plan.balancers]
    for balancer in made:
        require_suited(balancer, decider)
    return tuple(made)


def expert_rows(router: Router | Mixer) -> Float[Tensor, "E D"] | None:
    """The rows whose products with a token are its experts' logits; None where a method has none such."""
    if not declared_tags(type(router)) & {"expert_rows", "keeps_weights"}:
        return None
    rows: Tensor = router.get_parameter("weight")
    return rows


def reads(layers: Sequence[MoELayer | None], field: str) -> bool:
    """Whether any layer's router or mixer looks at a field of its input."""
    return any(f"reads:{field}" in tags_of(layer) for layer in layers)


def tags_of(layer: Any) -> frozenset[str]:
    """The tags of a layer's router or mixer; none for a dense layer."""
    return declared_tags(type(layer.router)) if isinstance(layer, MoELayer) else frozenset()
