"""What every upcycler promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._samples import sample_dense_trace
from mixtura.authoring.contracts._upcycled import FeedForward, filled_router, made, output_of_layer
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.upcyclers import Upcycler
from mixtura.types import LayerShape, Plan
from mixtura.types.upcycling import (
    Approach,
    Build,
    Carry,
    DenseShape,
    DenseTrace,
    Fill,
    Grow,
    Recipe,
    SetRouter,
    UpcycleShape,
    array_name,
)

_DENSE = DenseShape(d_model=6, d_ffn=24, num_layers=2, num_heads=4, num_key_value_heads=2, d_head=3)
_TOLERANCE = 1e-9
# An MoE model, for methods that change one.
_MOE = replace(_DENSE, num_experts=8, top_k=4)

Given = tuple[tuple[DenseShape, ...], UpcycleShape, DenseTrace | None]


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> Given:
    """Sources, as many as the method takes, a shape that they can have, and what text saw of them."""
    if method.has("of:moe"):
        return (_MOE,), UpcycleShape(num_experts=_MOE.num_experts, top_k=2, seed=seed), None
    number = 2 if method.has("composes") else 1
    shape = UpcycleShape(num_experts=2 * number if number == 1 else number, top_k=1, seed=seed)
    if number == 1:
        shape = replace(shape, num_experts=4, top_k=2)
    return (_DENSE,) * number, shape, _trace(method, seed, number)


def use(upcycler: Upcycler, given: Given) -> Recipe:
    """The recipe."""
    return upcycler.recipe(*given)


def check_every_layer_is_made(method: Subject) -> None:
    """Each layer has E experts of one width, a router, and all layers the same shared width; one carry."""
    given = sample(method, 1)
    recipe = use(method.create(), given)
    require(sum(isinstance(a, Carry) for a in recipe.actions) == 1, "a recipe has one action carry")
    if method.has("grows"):
        new = [a for a in recipe.actions if isinstance(a, Grow)]
        require(len(new) == len(recipe.actions) - 1 > 0, "a method that grows adds layers and nothing else")
        there = range(_DENSE.num_layers)
        require(all(a.after in there and a.copy_of in there for a in new), "a new layer stands on an old one")
        return
    if method.has("of:moe"):
        require(len(recipe.actions) == 1, "a method of MoE models keeps their experts as they are")
        return
    shared = set()
    for layer in range(_DENSE.num_layers):
        experts = made(recipe, layer)
        require(
            [action.expert for action in experts] == list(range(given[1].num_experts)),
            f"layer {layer} has experts {[a.expert for a in experts]}",
        )
        widths = {len(_neurons(action, recipe)) for action in experts}
        require(len(widths) == 1, f"experts of layer {layer} have the widths {sorted(widths)}")
        if method.has("own"):
            require(bool(recipe.own), "a method with the tag own says what its model is")
        else:
            routers = [a for a in recipe.actions if isinstance(a, SetRouter) and a.layer == layer]
            require(len(routers) == 1, f"layer {layer} has {len(routers)} routers")
            require(not recipe.own, "only a method with the tag own may make what ordinary families have not")
        own = [a for a in recipe.actions if isinstance(a, Build) and a.layer == layer and a.expert is None]
        require(len(own) <= 1, f"layer {layer} has {len(own)} shared experts")
        shared.add(len(_neurons(own[0], recipe)) if own else 0)
    require(len(shared) == 1 or "layers" in recipe.own, f"shared experts have the widths {sorted(shared)}")


def check_neurons_are_there(method: Subject) -> None:
    """Experts are made of sources and neurons that there are, a neuron once in an expert."""
    sources, shape, trace = sample(method, 2)
    recipe = use(method.create(), (sources, shape, trace))
    for action in recipe.actions:
        if isinstance(action, Build | Approach):
            require(0 <= action.source < len(sources), f"there is no source {action.source}")
            ids = _neurons(action, recipe)
            require(
                len(set(ids)) == len(ids) > 0 and min(ids) >= 0 and max(ids) < _DENSE.d_ffn,
                f"expert {action.expert} of layer {action.layer} has neurons {ids}",
            )


def check_arrays_are_named_by_what_they_hold(method: Subject) -> None:
    """Every array is named by its digest, used, and finite; router rows are E by D."""
    given = sample(method, 3)
    recipe = use(method.create(), given)
    used = {a.neurons for a in recipe.actions if isinstance(a, Build) and isinstance(a.neurons, str)}
    rows = {a.rows for a in recipe.actions if isinstance(a, SetRouter) and a.init == "rows"}
    fills = [a for a in recipe.actions if isinstance(a, Fill)]
    filling = {name for a in fills for name in (a.values, a.rows, a.times) if name is not None}
    require(set(recipe.arrays) == used | rows | filling, "arrays are missing, or named by no action")
    for name, values in recipe.arrays.items():
        require(array_name(values) == name, f"the array {name} is not named by its digest")
        require(bool(torch.isfinite(values).all()), f"the array {name} is not finite")
    wanted = (given[1].num_experts, _DENSE.d_model)
    require(
        all(tuple(recipe.arrays[str(name)].shape) == wanted for name in rows), "router rows must be E by D"
    )


def check_routers_of_its_own_are_made(method: Subject) -> None:
    """With the tag ``own`` the router that is named takes all that actions fill, of their shapes."""
    if not method.has("own"):
        return
    given = sample(method, 9)
    recipe = use(method.create(), given)
    if method.has("of:moe"):
        choice = dict(recipe.own["moe"]["router"])
        sizes = LayerShape(_MOE.d_model, _MOE.d_ffn, _MOE.num_experts)
        router = create("routers", choice.pop("name"), sizes, **choice)
        require(router.num_chosen == given[1].top_k, "as many experts run as are asked for")
        require("weight" in dict(router.named_parameters()), "the router takes over the rows of the old one")
        return
    for layer in range(_DENSE.num_layers):
        experts = made(recipe, layer)
        width = len(_neurons(experts[0], recipe))
        filled_router(recipe, layer, FeedForward.drawn(_DENSE.d_model, _DENSE.d_ffn, 9), len(experts), width)


def check_survives_json(method: Subject) -> None:
    """A plan of the recipe is the same after it was written and read."""
    recipe = use(method.create(), sample(method, 4))
    plan = Plan("sha256:0", recipe.actions, ("sha256:1",))
    require(Plan.from_json(plan.to_json()) == plan, "the plan does not survive JSON")


def check_initial_function_is_the_dense_one(method: Subject) -> None:
    """With the tag ``initial:dense`` a layer puts out what the dense part does, for any K that goes.

    New layers of methods that grow write nothing, whatever the method says: the core sees to that.
    """
    if not method.has("initial:dense") or method.has("grows"):
        return
    sources, shape, trace = sample(method, 5)
    dense = FeedForward.drawn(_DENSE.d_model, _DENSE.d_ffn, 5)
    x = torch.randn(50, _DENSE.d_model, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for top_k in (1, 2):
        recipe = use(method.create(), (sources, replace(shape, top_k=top_k), trace))
        for layer in range(_DENSE.num_layers):
            error = float((output_of_layer(recipe, layer, dense, x, top_k) - dense(x)).abs().max())
            require(error < _TOLERANCE * float(dense(x).abs().max()), f"with K = {top_k} it is {error} off")


def check_missing_text_is_refused(method: Subject) -> None:
    """A method that reads what text shows says so where there is none."""
    if not method.tagged("reads"):
        return
    sources, shape, _ = sample(method, 7)
    try:
        use(method.create(), (sources, shape, None))
    except UserError as error:
        require("text" in str(error) or "prompts" in str(error), f"the error must say what to give: {error}")
    else:
        require(False, "there is no text, and nothing is said of it")


def check_other_numbers_are_refused_in_words(method: Subject) -> None:
    """Numbers of experts that do not go raise an error with numbers, never another."""
    sources, shape, trace = sample(method, 8)
    for number in (3, 5, 7, 1000):
        if method.has("of:moe"):
            shape = replace(shape, num_experts=number, top_k=min(number, _MOE.top_k))
        try:
            use(method.create(), (sources, replace(shape, num_experts=number), trace))
        except UserError as error:
            require(any(c.isdigit() for c in str(error)), f"the error must have numbers: {error}")


def _neurons(action: Build | Approach, recipe: Recipe) -> list[int]:
    if isinstance(action, Approach) or action.neurons is None:
        return list(range(_DENSE.d_ffn))
    if isinstance(action.neurons, str):
        return [int(n) for n in recipe.arrays[action.neurons]]
    return list(range(*action.neurons))


def _trace(method: Subject, seed: int, number: int) -> DenseTrace | None:
    """A made-up trace with what the method's tags ask for alone; None where they ask for nothing."""
    wanted = method.tagged("reads")
    if not wanted:
        return None
    trace = sample_dense_trace(_DENSE, seed, num_groups=number)
    absent: dict[str, Any] = {} if "products" in wanted else {"products": None, "targets": None}
    absent |= {} if "activations" in wanted else {"activations": None, "often": None}
    absent |= {name: None for name in ("largest", "domains") if name not in wanted}
    layers = tuple(replace(layer, **absent) for layer in trace.layers)
    return replace(trace, layers=layers, embeddings=trace.embeddings if "words" in wanted else None)
