"""What every analysis promises."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._samples import relabelled, sample_trace
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UserError
from mixtura.methods import kind
from mixtura.methods.analyses import Analysis, Evidence, Grid, Report
from mixtura.running.observing.studying import studying
from mixtura.types.trace import Trace

_NUM_EXPERTS = 8
_NUM_LAYERS = 3
_NUM_CHECKPOINTS = 3
_WORDS = 24


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


@final
@dataclass(frozen=True, slots=True)
class Case:
    """What an analysis is given: evidence, and the seed of the model that its study is of, if of any."""

    evidence: Evidence
    model: int | None = None
    steers: bool = False


def sample(method: Subject, seed: int) -> Case:
    """What the analysis's tags ask for, and nothing else."""
    traces: tuple[Trace, ...] = ()
    if _reads_traces(method):
        number = _NUM_CHECKPOINTS if method.has("needs:series") else 1
        traces = tuple(_trace(method, seed, place) for place in range(number))
    runs = tuple(method.cls.example) if method.has("needs:runs") else ()
    evidence = Evidence(traces=traces, runs=runs)
    if not method.has("needs:study"):
        return Case(evidence)
    return Case(evidence, seed, method.has("steers"))


def use(analysis: Analysis, case: Case) -> Report:
    """The report."""
    if case.model is None:
        return analysis.measure(case.evidence)
    with studying(_model(case.model), _text(case.model), steers=case.steers) as study:
        return analysis.measure(replace(case.evidence, study=study))


def check_tags_are_known(method: Subject) -> None:
    """Every tag means something to this kind."""
    for tag in method.header.tags:
        require(kind("analyses").explain(tag), f"analyses have no tag {tag!r}")


def check_one_row_per_layer(method: Subject) -> None:
    """Every layer has a row, in order, with the same columns; what is of no layers has a table."""
    case = sample(method, 10)
    report = use(method.create(), case)
    require(report.scalars, "there must be a number for all of it")
    if not case.evidence.traces and case.model is None:
        require(report.tables and not report.rows, "what is of no layers has tables, and no rows")
        return
    found = [row.get("layer") for row in report.rows]
    require(found == list(range(_NUM_LAYERS)), f"rows are of layers {found}")
    require(all(tuple(row) == report.columns for row in report.rows), "rows differ in their columns")
    require(report.columns[0] == "layer", "the first column must be layer")


def check_report_is_json(method: Subject) -> None:
    """The report survives JSON, and no number is NaN or infinite."""
    values = use(method.create(), sample(method, 11)).to_dict()
    require(json.loads(json.dumps(values, allow_nan=False)) == values, "the report does not survive JSON")


def check_figures_can_be_drawn(method: Subject) -> None:
    """Tables are as wide as their headings, maps as their labels, and all numbers in figures are finite."""
    report = use(method.create(), sample(method, 15))
    for table in report.tables:
        require(all(len(row) == len(table.columns) for row in table.rows), f"{table.title} has ragged rows")
    for figure in report.figures:
        if isinstance(figure, Grid):
            shape = [len(row) for row in figure.values]
            fits = shape == [len(figure.column_labels)] * len(figure.row_labels)
            require(fits, f"{figure.title} is not as large as its labels say")
            numbers = [value for row in figure.values for value in row if value is not None]
        else:
            numbers = [value for line in figure.series.values() for point in line for value in point]
        require(all(map(math.isfinite, numbers)), f"{figure.title} shows numbers that are not finite")


def check_nothing_seen(method: Subject) -> None:
    """A trace without a token gives a report, with `None` where there is nothing to measure."""
    if not _reads_traces(method):
        return
    evidence = sample(method, 12).evidence
    empty = Case(replace(evidence, traces=tuple(map(_emptied, evidence.traces))))
    json.dumps(use(method.create(), empty).to_dict(), allow_nan=False)


def check_expert_order_is_irrelevant(method: Subject) -> None:
    """Experts in another order give the same numbers (not for the tag ``label_dependent``)."""
    if method.has("label_dependent") or method.has("needs:study") or not _reads_traces(method):
        return
    evidence = sample(method, 13).evidence
    generator = torch.Generator().manual_seed(13)
    orders = [torch.randperm(_NUM_EXPERTS, generator=generator) for _ in range(_NUM_LAYERS)]
    other = replace(evidence, traces=tuple(relabelled(one, orders) for one in evidence.traces))
    straight, moved = (use(method.create(), Case(case)) for case in (evidence, other))
    for left, right in zip((straight.scalars, *straight.rows), (moved.scalars, *moved.rows), strict=True):
        for name, value in left.items():
            other_value = right[name]
            near = value == other_value or (
                value is not None
                and other_value is not None
                and abs(value - other_value) <= 1e-6 * max(1, abs(value))
            )
            require(near, f"{name} is {value}, with relabelled experts {other_value}")


def check_what_is_missing_is_said(method: Subject) -> None:
    """Without any one thing that its tags ask for, the analysis says so in a `UserError`."""
    for tag in method.header.tags:
        less = _without(tag, sample(method, 14).evidence)
        if less is None:
            continue
        try:
            use(method.create(), Case(less))
        except UserError as error:
            require("\n" not in str(error), f"what it says without {tag} is more than a sentence")
        else:
            require(False, f"it says nothing of what is missing without {tag}")


def _reads_traces(method: Subject) -> bool:
    return not any(map(method.has, ("needs:study", "needs:runs", "simulates")))


def _trace(method: Subject, seed: int, place: int) -> Trace:
    """A trace of three layers in twelve texts with what the analysis's tags ask for."""
    made = sample_trace(seed + 100 * place, num_layers=_NUM_LAYERS, num_experts=_NUM_EXPERTS)
    length = sum(made.num_tokens) // 12
    made = replace(
        made,
        sequence_lengths=(length,) * 12,
        sequence_domains=(0, 1) * 6,
        token_ids=sample_trace(seed).token_ids,
        step=100 * place,
    )
    return _declared(method, made)


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
            logits=layer.logits if "logits" in needs else None,
        )
        for layer in trace.layers
    )
    ids = trace.token_ids if "choices" in needs else None
    return replace(trace, layers=tuple(layers), token_ids=ids)


def _emptied(trace: Trace) -> Trace:
    """The trace of no text at all."""
    layers = tuple(
        replace(
            layer,
            counts=torch.zeros_like(layer.counts),
            weight_sums=torch.zeros_like(layer.weight_sums),
            statistics={name: torch.zeros_like(values) for name, values in layer.statistics.items()},
            coactivation=None if layer.coactivation is None else torch.zeros_like(layer.coactivation),
            transitions=None if layer.transitions is None else torch.zeros_like(layer.transitions),
            choices=None if layer.choices is None else layer.choices[:0],
            logits=None if layer.logits is None else layer.logits[:0],
        )
        for layer in trace.layers
    )
    return replace(
        trace,
        layers=layers,
        num_tokens=(0,) * len(trace.domains),
        sequence_lengths=(),
        sequence_domains=(),
        token_ids=None if trace.token_ids is None else trace.token_ids[:0],
    )


def _without(tag: str, evidence: Evidence) -> Evidence | None:
    """The evidence without what a tag asks for; None for a tag that asks for nothing."""
    changes: dict[str, dict[str, Any]] = {
        "statistic": {"statistics": {}},
        "needs:choices": {"choices": None},
        "needs:logits": {"logits": None},
    }
    found = changes.get(tag.partition(":")[0], changes.get(tag))
    if found is not None:
        traces = tuple(
            replace(one, token_ids=None, layers=tuple(replace(x, **found) for x in one.layers))
            for one in evidence.traces
        )
        return replace(evidence, traces=traces)
    return {
        "needs:series": replace(evidence, traces=evidence.traces[:1]),
        "needs:study": replace(evidence, study=None),
        "needs:runs": replace(evidence, runs=()),
    }.get(tag)


def _model(seed: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=_WORDS,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=2,
        num_experts=_NUM_EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoeForCausalLM(config).eval()


def _text(seed: int) -> TokenBatch:
    ids = torch.randint(2, _WORDS, (6, 12), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(ids, torch.ones_like(ids), torch.tensor([0, 1] * 3), ("prose", "code"))
