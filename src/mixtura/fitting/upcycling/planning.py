"""From a method and dense models to a plan: what it has to see, its recipe, and a family that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.apply import digests
from mixtura.checkpoints.upcycling.experts import Workshop
from mixtura.checkpoints.upcycling.targets import TARGETS, choose_target
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.errors import MixturaError, UserError
from mixtura.methods import header
from mixtura.methods.upcyclers import Upcycler
from mixtura.running.dense_tracing import Group, Wanted, trace_dense
from mixtura.types import Action, Plan
from mixtura.types.upcycling import Approach, Become, Build, Carry, DenseTrace, Recipe, UpcycleShape

# The width of a shared expert that adds nothing, where a family must have one and the method makes none.
_EMPTY_WIDTH = 64
_ON_TEXT, _ON_PROMPTS = {"activations", "largest", "domains"}, {"words", "prompts", "own", "products"}


def reads(method: str) -> set[str]:
    """What an upcycler reads of text, by its tags."""
    tags = header("upcyclers", method).tags
    return {tag.partition(":")[2] for tag in tags if tag.startswith("reads:")}


def needs_prompts(method: str) -> bool:
    """Whether it reads prompts for each source."""
    return bool(reads(method) & _ON_PROMPTS)


def needs_text(method: str) -> bool:
    """Whether it reads text in general."""
    return bool(reads(method) & _ON_TEXT)


def takes_moe(method: str) -> bool:
    """Whether it changes an MoE model, where others begin with dense ones."""
    return "of:moe" in header("upcyclers", method).tags


def grows_layers(method: str) -> bool:
    """Whether it adds layers to a dense model, which stays one."""
    return "grows" in header("upcyclers", method).tags


def check_target(view: DenseView, wanted: str | None, method: str) -> None:
    """Refuse a family that cannot hold the model whatever its experts are, before anything is read for long.

    Raises:
        UserError: there is none of that name, or it cannot; says which can.
    """
    found = None if wanted is None else TARGETS.get(wanted)
    shared = 0 if found is None or found.shared == "none" else view.shape.d_ffn
    own: dict[str, Any] = {"moe": {}} if "own" in header("upcyclers", method).tags else {}
    choose_target(view.traits, Become("", 2, 1, view.shape.d_ffn, shared, own), wanted)


def traced(
    sources: Sequence[DenseView], method: str, groups: Sequence[Group], notify: Callable[[str], None]
) -> DenseTrace | None:
    """What a method is to see of text; None where it reads none."""
    asked = reads(method)
    if not asked:
        return None
    share = 1.0 / len(sources)
    carry = Carry(tuple(range(len(sources))), (share,) * len(sources))
    wanted = Wanted(**dict.fromkeys(sorted(asked), True))
    return trace_dense(sources, carry, groups, wanted, notify)


def plan_of(
    upcycler: Upcycler,
    sources: Sequence[DenseView],
    shape: UpcycleShape,
    trace: DenseTrace | None,
    wanted: str | None,
    teach: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan and its arrays; ``teach`` does what lessons a recipe asks for.

    Raises:
        UserError: the method cannot do it with these sizes, or no family can hold what it makes.
    """
    recipe = upcycler.recipe(tuple(view.shape for view in sources), shape, trace)
    become = replace(_become(recipe, sources, shape), settings=dict(recipe.own))
    target = choose_target(sources[0].traits, become, wanted)
    become = replace(become, family=target.model_type)
    more: list[Action] = []
    if target.needs_shared and not become.shared_width:
        width = min(_EMPTY_WIDTH, sources[0].shape.d_ffn)
        become = replace(become, shared_width=width)
        layers = range(sources[0].shape.num_layers)
        more = [Build(layer, None, 0, (0, width), scale=0.0) for layer in layers]
    recipe = teach(recipe)
    first, *others = digests(sources)
    return Plan(first, (become, *recipe.actions, *more), tuple(others)), dict(recipe.arrays)


def become_of(plan: Plan) -> Become:
    """The plan's family and sizes."""
    return next(action for action in plan.actions if isinstance(action, Become))


def carry_of(plan: Plan) -> Carry:
    """What the plan does to tensors outside the experts."""
    return next(action for action in plan.actions if isinstance(action, Carry))


def is_exact(plan: Plan, method: str) -> bool:
    """Whether the method promises the dense model's function, as it is set."""
    drawn = any(isinstance(action, Build) and action.redrawn for action in plan.actions)
    return "initial:dense" in header("upcyclers", method).tags and not plan.other_digests and not drawn


def _become(recipe: Recipe, sources: Sequence[DenseView], shape: UpcycleShape) -> Become:
    workshop = Workshop(sources, recipe.arrays, compute_dtype(sources[0].config))
    experts, shared = set[int](), {0}
    for action in recipe.actions:
        if isinstance(action, Build | Approach):
            (shared if action.expert is None else experts).add(workshop.width(action))
    shared = shared - {0} or {0}
    if recipe.own.get("layers"):
        # Layers say what is theirs; what is said for all is the widest.
        experts, shared = {max(experts)}, {max(shared)}
    if len(experts) != 1 or len(shared) != 1:
        raise MixturaError(f"a method made experts of the widths {sorted(experts)} and {sorted(shared)}")
    return Become("", shape.num_experts, shape.top_k, experts.pop(), shared.pop(), {})


def check_number(num_sources: int, composes: bool, method: str) -> None:
    """Refuse a number of models that a method does not take.

    Raises:
        UserError: says which command takes it.
    """
    several = "composes" in header("upcyclers", method).tags
    if several and not composes:
        raise UserError(
            f"{method} makes one model of several: mixtura compose A B C --method {method}; for one model "
            "`mixtura methods upcyclers` lists methods without the tag composes, such as copies"
        )
    if composes and not several:
        raise UserError(
            f"{method} takes one model: mixtura upcycle MODEL --method {method}; for several `mixtura "
            "methods upcyclers` lists methods with the tag composes, such as prompt_gates"
        )
    if composes and num_sources < 2:
        raise UserError("compose makes one model of several; give two directories or more")
