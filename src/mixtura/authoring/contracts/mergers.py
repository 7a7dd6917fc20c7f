"""What every merger promises."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._samples import relabelled, sample_trace
from mixtura.errors import BudgetError
from mixtura.methods.mergers import Merger
from mixtura.types import Budget, Merge, Plan
from mixtura.types.trace import Trace

_NUM_EXPERTS = 8
_EXPERT_NUM_BYTES = 1000
# Shares are written as decimal numbers of float64.
_SUM_TOLERANCE = 1e-9

Groups = dict[int, set[frozenset[int]]]


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Trace, Budget]:
    """A trace of two layers, and a budget of half their experts."""
    return _trace(method, seed), Budget(num_experts=_NUM_EXPERTS // 2)


def use(merger: Merger, given: tuple[Trace, Budget]) -> Plan:
    """The plan."""
    return merger.plan(*given)


def check_only_merges(method: Subject) -> None:
    """The plan merges experts that are there, each in one group at most, and names the trace's model."""
    trace, budget = sample(method, 20)
    plan = use(method.create(), (trace, budget))
    require(plan.source_digest == trace.source_digest, "the plan must carry the trace's source_digest")
    seen: set[tuple[int, int]] = set()
    for action in plan.actions:
        require(isinstance(action, Merge), f"a merger only merges, got {action}")
        assert isinstance(action, Merge)
        named = {(action.layer, expert) for expert in action.experts}
        require(all(0 <= e < _NUM_EXPERTS for e in action.experts), f"an expert is not there: {action}")
        require(
            len(named) == len(action.experts) > 1 and not named & seen,
            f"an expert is merged twice, or alone: {action}",
        )
        seen |= named
    require(Plan.from_json(plan.to_json()) == plan, "the plan does not survive JSON")


def check_shares_are_an_average(method: Subject) -> None:
    """The shares of every group are not negative and sum to one, also where no token chose its members."""
    trace, budget = sample(method, 21)
    for share in (1.0, 0.5, 0.0):
        for action in use(method.create(), (_unseen(trace, share), budget)).actions:
            assert isinstance(action, Merge)
            require(
                len(action.shares) == len(action.experts)
                and all(one >= 0 for one in action.shares)
                and abs(sum(action.shares) - 1) < _SUM_TOLERANCE,
                f"shares must be an average: {action}",
            )


def check_keeping_all_is_the_empty_plan(method: Subject) -> None:
    """A budget of all experts or more, in count or in bytes, changes nothing."""
    trace = _trace(method, 22)
    total = len(trace.layers) * _NUM_EXPERTS * _EXPERT_NUM_BYTES
    for budget in (Budget(num_experts=_NUM_EXPERTS), Budget(num_experts=99), Budget(num_bytes=total)):
        require(
            not use(method.create(), (trace, budget)).actions, f"{budget} needs no merge, yet some are made"
        )


def check_every_layer_stores_the_budget(method: Subject) -> None:
    """Every layer stores exactly the number of experts asked for, down to one."""
    trace = _trace(method, 23)
    for wanted in range(1, _NUM_EXPERTS + 1):
        groups = _groups(trace, use(method.create(), (trace, Budget(num_experts=wanted))))
        require(
            {len(found) for found in groups.values()} == {wanted}, f"asked to store {wanted}, got {groups}"
        )


def check_bytes_are_held_and_used(method: Subject) -> None:
    """A budget in bytes is held, and one expert more in each layer would not fit."""
    trace = _trace(method, 24)
    row = len(trace.layers) * _EXPERT_NUM_BYTES
    for limit in (row, 4 * row - 1, 5 * row + 1):
        groups = _groups(trace, use(method.create(), (trace, Budget(num_bytes=limit))))
        spent = sum(map(len, groups.values())) * _EXPERT_NUM_BYTES
        require(limit - row < spent <= limit, f"of {limit} bytes {spent} are used")


def check_impossible_budget(method: Subject) -> None:
    """A budget of no expert raises `BudgetError` that says the smallest possible one."""
    trace = _trace(method, 25)
    row = len(trace.layers) * _EXPERT_NUM_BYTES
    for budget, least in ((Budget(num_experts=0), 1), (Budget(num_bytes=row - 1), row)):
        try:
            use(method.create(), (trace, budget))
        except BudgetError as error:
            numbers = [int(number) for number in re.findall(r"\d+", str(error))]
            require(least in numbers, f"the error must say the smallest budget, {least}: {error}")
        else:
            require(False, f"{budget} leaves no expert, yet no BudgetError is raised")


def check_relabelling(method: Subject) -> None:
    """Experts in another order: the same experts are merged (not for the tag ``label_dependent``)."""
    if method.has("label_dependent"):
        return
    trace, budget = sample(method, 26)
    generator = torch.Generator().manual_seed(26)
    orders = [torch.randperm(_NUM_EXPERTS, generator=generator) for _ in trace.layers]
    groups = _groups(trace, use(method.create(), (trace, budget)))
    moved = _groups(trace, use(method.create(), (relabelled(trace, orders), budget)))
    for layer, order in zip(trace.layers, orders, strict=True):
        old = {frozenset(int(order[expert]) for expert in group) for group in moved[layer.index]}
        require(
            old == groups[layer.index], f"layer {layer.index} has {groups[layer.index]}, relabelled {old}"
        )


def check_unseen_experts_are_grouped(method: Subject) -> None:
    """A trace in which some experts were never chosen, or nothing at all, still gives a plan."""
    trace, budget = sample(method, 27)
    for share in (0.5, 0.0):
        groups = _groups(trace, use(method.create(), (_unseen(trace, share), budget)))
        require(all(len(g) == budget.num_experts for g in groups.values()), f"unseen experts: {groups}")


def check_protected_experts_stay_alone(method: Subject) -> None:
    """Experts that the budget protects are merged with no other, whatever the method makes of them."""
    trace = _trace(method, 28)
    free = _groups(trace, use(method.create(), (trace, Budget(num_experts=4))))
    protected = {index: _largest(groups)[:2] for index, groups in free.items()}
    budget = Budget(num_experts=4, protected=protected)
    for index, groups in _groups(trace, use(method.create(), (trace, budget))).items():
        require(
            len(groups) == 4 and all(frozenset({expert}) in groups for expert in protected[index]),
            f"layer {index} is to leave {protected[index]} alone, and has {groups}",
        )


def _groups(trace: Trace, plan: Plan) -> Groups:
    """What every layer stores: groups that became one, and experts that are alone."""
    merged = plan.merged()
    found: Groups = {}
    for layer in trace.layers:
        groups = [frozenset(merge.experts) for merge in merged.get(layer.index, ())]
        inside = frozenset().union(*groups)
        alone = [frozenset({e}) for e in range(layer.shape.num_experts) if e not in inside]
        found[layer.index] = {*groups, *alone}
    return found


def _largest(groups: set[frozenset[int]]) -> tuple[int, ...]:
    """The members of the largest group."""
    return max((tuple(sorted(group)) for group in groups), key=lambda group: (len(group), group))


def _unseen(trace: Trace, share: float) -> Trace:
    """The trace with only the first so many experts chosen at all."""
    seen = torch.arange(_NUM_EXPERTS) < math.ceil(share * _NUM_EXPERTS)
    layers = (
        replace(
            layer,
            counts=layer.counts * seen,
            weight_sums=layer.weight_sums * seen,
            statistics={name: values * seen for name, values in layer.statistics.items()},
            features={n: v * (seen[:, None] if n == "mean_output" else 1) for n, v in layer.features.items()},
        )
        for layer in trace.layers
    )
    return replace(trace, layers=tuple(layers))


def _trace(method: Subject, seed: int) -> Trace:
    """A made-up trace with those statistics and features alone that the method's tags ask for."""
    trace = sample_trace(seed, num_experts=_NUM_EXPERTS)
    statistics, features = method.tagged("statistic"), method.tagged("feature")
    layers = (
        replace(
            layer,
            statistics={n: v for n, v in layer.statistics.items() if n in statistics},
            features={n: v for n, v in layer.features.items() if n in features},
        )
        for layer in trace.layers
    )
    return replace(trace, layers=tuple(layers))
