"""What every pruner promises."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._samples import relabelled, sample_trace
from mixtura.errors import BudgetError
from mixtura.methods.pruners import Pruner
from mixtura.types import Budget, Drop, Plan
from mixtura.types.trace import Trace

_NUM_EXPERTS = 8
_EXPERT_NUM_BYTES = 1000


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Trace, Budget]:
    """A trace of two layers, and a budget of half their experts."""
    return _trace(method, seed), Budget(num_experts=_NUM_EXPERTS // 2)


def use(pruner: Pruner, given: tuple[Trace, Budget]) -> Plan:
    """The plan."""
    return pruner.plan(*given)


def check_only_drops(method: Subject) -> None:
    """The plan drops experts that are there, each once, and names the trace's model."""
    trace, budget = sample(method, 10)
    plan = use(method.create(), (trace, budget))
    require(plan.source_digest == trace.source_digest, "the plan must carry the trace's source_digest")
    for action in plan.actions:
        require(isinstance(action, Drop), f"a pruner only drops, got {action}")
        require(
            isinstance(action, Drop) and all(0 <= e < _NUM_EXPERTS for e in action.experts),
            f"an expert that is not there is dropped: {action}",
        )
    require(Plan.from_json(plan.to_json()) == plan, "the plan does not survive JSON")


def check_keeping_all_is_the_empty_plan(method: Subject) -> None:
    """A budget of all experts or more, in count or in bytes, changes nothing."""
    trace = _trace(method, 11)
    total = len(trace.layers) * _NUM_EXPERTS * _EXPERT_NUM_BYTES
    for budget in (Budget(num_experts=_NUM_EXPERTS), Budget(num_experts=99), Budget(num_bytes=total)):
        require(
            not use(method.create(), (trace, budget)).actions, f"{budget} needs no drop, yet some are made"
        )


def check_every_layer_keeps_the_budget(method: Subject) -> None:
    """Every layer keeps exactly the number of experts asked for."""
    trace = _trace(method, 12)
    for wanted in range(trace.layers[0].top_k, _NUM_EXPERTS + 1):
        kept = _kept(trace, use(method.create(), (trace, Budget(num_experts=wanted))))
        require(
            {len(experts) for experts in kept.values()} == {wanted}, f"asked to keep {wanted}, got {kept}"
        )


def check_bytes_are_held_and_used(method: Subject) -> None:
    """A budget in bytes is held, and one expert more in each layer would not fit."""
    trace = _trace(method, 13)
    row = len(trace.layers) * _EXPERT_NUM_BYTES
    for limit in (3 * row, 4 * row - 1, 5 * row + 1):
        kept = _kept(trace, use(method.create(), (trace, Budget(num_bytes=limit))))
        spent = sum(map(len, kept.values())) * _EXPERT_NUM_BYTES
        require(limit - row < spent <= limit, f"of {limit} bytes {spent} are used")


def check_groups_lose_alike(method: Subject) -> None:
    """Each group of a group-limited router keeps the same number of experts."""
    trace = _trace(method, 14, num_experts=16, num_groups=4, top_groups=2)
    kept = _kept(trace, use(method.create(), (trace, Budget(num_experts=9))))
    for experts in kept.values():
        per_group = [sum(expert // 4 == group for expert in experts) for group in range(4)]
        require(per_group == [2] * 4, f"of 16 experts in 4 groups 8 are to stay, 2 a group; got {per_group}")


def check_impossible_budget(method: Subject) -> None:
    """A budget below what routing needs raises `BudgetError` that says the smallest possible one."""
    trace = _trace(method, 15, top_k=3)
    for budget in (Budget(num_experts=2), Budget(num_bytes=2 * len(trace.layers) * _EXPERT_NUM_BYTES)):
        try:
            use(method.create(), (trace, budget))
        except BudgetError as error:
            numbers = [int(number) for number in re.findall(r"\d+", str(error))]
            in_bytes = 3 * len(trace.layers) * _EXPERT_NUM_BYTES
            enough = Budget(num_experts=3) if budget.num_bytes is None else Budget(num_bytes=in_bytes)
            least = enough.num_experts or enough.num_bytes
            require(least in numbers, f"the error must say the smallest budget, {least}: {error}")
            use(method.create(), (trace, enough))
        else:
            require(
                False, f"{budget} leaves fewer experts than a token chooses, yet no BudgetError is raised"
            )


def check_relabelling(method: Subject) -> None:
    """Experts in another order: the same experts go (not for the tag ``label_dependent``)."""
    if method.has("label_dependent"):
        return
    trace, budget = sample(method, 16)
    generator = torch.Generator().manual_seed(16)
    orders = [torch.randperm(_NUM_EXPERTS, generator=generator) for _ in trace.layers]
    kept = _kept(trace, use(method.create(), (trace, budget)))
    moved = _kept(trace, use(method.create(), (relabelled(trace, orders), budget)))
    for layer, order in zip(trace.layers, orders, strict=True):
        old = {int(order[expert]) for expert in moved[layer.index]}
        require(old == kept[layer.index], f"layer {layer.index} keeps {kept[layer.index]}, relabelled {old}")


def check_unseen_experts_have_a_score(method: Subject) -> None:
    """A trace in which some experts were never chosen, or nothing at all, still gives a plan."""
    trace, budget = sample(method, 17)
    for share in (0.5, 0.0):
        seen = torch.arange(_NUM_EXPERTS) < math.ceil(share * _NUM_EXPERTS)
        layers = tuple(
            replace(
                layer,
                counts=layer.counts * seen,
                weight_sums=layer.weight_sums * seen,
                statistics={name: values * seen for name, values in layer.statistics.items()},
            )
            for layer in trace.layers
        )
        kept = _kept(trace, use(method.create(), (replace(trace, layers=layers), budget)))
        require(all(len(e) == budget.num_experts for e in kept.values()), f"unseen experts: keeps {kept}")


def check_protected_experts_stay(method: Subject) -> None:
    """Experts that the budget protects stay, whatever the method makes of them."""
    trace = _trace(method, 18)
    free = _kept(trace, use(method.create(), (trace, Budget(num_experts=3))))
    protected = {
        layer.index: tuple(e for e in range(_NUM_EXPERTS) if e not in free[layer.index])[:2]
        for layer in trace.layers
    }
    kept = _kept(trace, use(method.create(), (trace, Budget(num_experts=3, protected=protected))))
    for index, experts in kept.items():
        require(
            len(experts) == 3 and experts >= set(protected[index]),
            f"layer {index} is to keep 3 experts, {protected[index]} among them, and keeps {experts}",
        )


def check_only_counts_that_may_be(method: Subject) -> None:
    """Where the budget names the numbers a layer may have, the largest of them that fits is kept."""
    trace = _trace(method, 19)
    for wanted, expected in ((7, 4), (4, 4), (3, 2), (8, 8)):
        kept = _kept(trace, use(method.create(), (trace, Budget(num_experts=wanted, counts=(2, 4)))))
        require({len(experts) for experts in kept.values()} == {expected}, f"of {wanted}: {kept}")


def _kept(trace: Trace, plan: Plan) -> dict[int, set[int]]:
    """The experts that stay, by layer."""
    dropped = plan.dropped()
    return {
        layer.index: set(range(layer.shape.num_experts)) - set(dropped.get(layer.index, ()))
        for layer in trace.layers
    }


def _trace(method: Subject, seed: int, num_experts: int = _NUM_EXPERTS, **sizes: int) -> Trace:
    """A made-up trace with those statistics alone that the method's tags ask for."""
    trace = sample_trace(seed, num_experts=num_experts, **sizes)
    wanted = method.tagged("statistic")
    layers = (
        replace(layer, statistics={n: v for n, v in layer.statistics.items() if n in wanted})
        for layer in trace.layers
    )
    return replace(trace, layers=tuple(layers))
