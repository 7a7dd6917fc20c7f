"""What every analysis promises."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._samples import relabelled, sample_trace
from mixtura.methods.analyses import Analysis, Report
from mixtura.types.trace import Trace

_NUM_EXPERTS = 8


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> Trace:
    """A trace of three layers with what the analysis's tags ask for."""
    return _declared(method, sample_trace(seed, num_layers=3, num_experts=_NUM_EXPERTS))


def use(analysis: Analysis, trace: Trace) -> Report:
    """The report."""
    return analysis.measure(trace)


def check_one_row_per_layer(method: Subject) -> None:
    """Every layer has a row, in order, with the same columns, ``layer`` first."""
    trace = sample(method, 10)
    report = use(method.create(), trace)
    found = [row.get("layer") for row in report.rows]
    require(found == [layer.index for layer in trace.layers], f"rows are of layers {found}")
    require(all(tuple(row) == report.columns for row in report.rows), "rows differ in their columns")
    require(report.columns[0] == "layer", "the first column must be layer")
    require(report.scalars, "there must be a number for the whole model")


def check_report_is_json(method: Subject) -> None:
    """The report survives JSON, and no number is NaN or infinite."""
    values = use(method.create(), sample(method, 11)).to_dict()
    require(json.loads(json.dumps(values, allow_nan=False)) == values, "the report does not survive JSON")


def check_nothing_seen(method: Subject) -> None:
    """A trace without a token gives a report, with `None` where there is nothing to measure."""
    trace = sample(method, 12)
    layers = tuple(
        replace(
            layer,
            counts=torch.zeros_like(layer.counts),
            weight_sums=torch.zeros_like(layer.weight_sums),
            statistics={name: torch.zeros_like(values) for name, values in layer.statistics.items()},
            coactivation=None if layer.coactivation is None else torch.zeros_like(layer.coactivation),
            transitions=None if layer.transitions is None else torch.zeros_like(layer.transitions),
            choices=None if layer.choices is None else layer.choices[:0],
        )
        for layer in trace.layers
    )
    empty = replace(trace, layers=layers, num_tokens=(0,) * len(trace.domains), sequence_lengths=())
    json.dumps(use(method.create(), empty).to_dict(), allow_nan=False)


def check_expert_order_is_irrelevant(method: Subject) -> None:
    """Experts in another order give the same numbers (not for the tag ``label_dependent``)."""
    if method.has("label_dependent"):
        return
    trace = sample(method, 13)
    generator = torch.Generator().manual_seed(13)
    orders = [torch.randperm(_NUM_EXPERTS, generator=generator) for _ in trace.layers]
    straight, moved = (use(method.create(), case) for case in (trace, relabelled(trace, orders)))
    for left, right in zip((straight.scalars, *straight.rows), (moved.scalars, *moved.rows), strict=True):
        for name, value in left.items():
            other = right[name]
            near = value == other or (
                value is not None and other is not None and abs(value - other) <= 1e-6 * max(1, abs(value))
            )
            require(near, f"{name} is {value}, with relabelled experts {other}")


def _declared(method: Subject, trace: Trace) -> Trace:
    """The trace with those statistics and records alone that the method's tags ask for."""
    statistics, needs = method.tagged("statistic"), method.tagged("needs")
    layers = (
        replace(
            layer,
            statistics={n: v for n, v in layer.statistics.items() if n in statistics},
            coactivation=layer.coactivation if "coactivation" in needs else None,
            transitions=layer.transitions if "transitions" in needs else None,
            choices=layer.choices if "choices" in needs else None,
        )
        for layer in trace.layers
    )
    return replace(trace, layers=tuple(layers))
