"""The page a fit leaves behind: what it cost, what was tried, what happened to every expert."""

from __future__ import annotations

from collections.abc import Iterable

from mixtura.fitting.frontier import USUAL_GROWTH, cliff, frontier_rows
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Measured
from mixtura.fitting.result import Fitted, Row
from mixtura.report import (
    Highlight,
    Html,
    Limit,
    Section,
    Series,
    category_map_svg,
    counted,
    details,
    facts,
    human_number,
    human_percent,
    line_svg,
    note,
    page,
    paragraph,
    side_by_side,
    table_html,
)
from mixtura.report.units import format_bytes

_MIB = 2.0**20
_ABSENT = "–"


def report_html(fitted: Fitted) -> str:
    """The whole report as one self-contained page."""
    sections = [Section("Result", [*_result(fitted)]), Section("By domain", [*_domains(fitted)])]
    if fitted.tried:
        sections += [
            Section("Everything tried", [*_tried(fitted)]),
            Section(f"What happened to every {_part(fitted)}", [*_parts(fitted)]),
        ]
    if fitted.samples:
        sections.append(Section("Answers side by side", [*_samples(fitted)]))
    if fitted.commands:
        sections.append(Section("Where it runs", [facts(dict(fitted.commands))]))
    sections += [
        Section("Left as it was", [*_untouched(fitted)]),
        Section("How this was measured", [facts({k: str(v) for k, v in fitted.about.items()})]),
    ]
    return page(f"{fitted.model} in less memory", sections, summary=_summary(fitted))


def _summary(fitted: Fitted) -> str:
    before, after = fitted.before, fitted.after
    return (
        f"From {format_bytes(before.weights_bytes)} of weights to {format_bytes(after.weights_bytes)}, at a "
        f"measured loss of {human_number(after.quality.kl)} nats per token; "
        f"{human_percent(after.quality.equal_top)} of the most likely tokens are the same."
    )


def table_rows(rows: Iterable[Row], runtime_bytes: int) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table of models, as the terminal and the page show it."""
    headers = [
        "model",
        "weights",
        "read per token",
        "KL, nats (95 % interval)",
        "same top token",
        "perplexity",
        "tokens/s",
        "accounted",
        "accounted, process",
        "measured peak",
    ]
    cells = []
    for row in rows:
        quality = row.quality
        cells.append(
            [
                _named(row),
                format_bytes(row.weights_bytes),
                format_bytes(row.active_bytes),
                f"{human_number(quality.kl)} ({human_number(quality.kl_low)} to "
                f"{human_number(quality.kl_high)})",
                human_percent(quality.equal_top),
                human_number(quality.perplexity[ALL]),
                _ABSENT if row.tokens_per_second is None else human_number(row.tokens_per_second),
                format_bytes(row.accounted_bytes),
                format_bytes(row.accounted_bytes + runtime_bytes),
                _ABSENT if row.peak_bytes is None else format_bytes(row.peak_bytes),
            ]
        )
    return headers, cells


def _named(row: Row) -> str:
    if not row.label or row.label.startswith(row.name):
        return row.label or row.name
    return f"{row.name}: {row.label}"


def domain_rows(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of perplexity and exact answers by domain and task."""
    models = list(rows)
    headers = ["text", *(f"{what}, {row.name}" for what in ("perplexity", "exact") for row in models)]
    names = [n for n in models[0].quality.perplexity if n != ALL]
    names += [n for n in models[0].quality.accuracy if n != ALL and n not in names]
    cells = []
    for name in [*names, ALL]:
        perplexity = [row.quality.perplexity.get(name) for row in models]
        accuracy = [row.quality.accuracy.get(name) for row in models]
        cells.append(
            [
                name,
                *(_ABSENT if value is None else human_number(value) for value in perplexity),
                *(_ABSENT if value is None else human_percent(value) for value in accuracy),
            ]
        )
    return headers, cells


def _result(fitted: Fitted) -> Iterable[Html]:
    whole = "the whole process" if fitted.budget_kind == "process" else "weights, cache and buffers"
    yield facts(
        {
            "budget": f"{format_bytes(fitted.budget_bytes)} for {whole}",
            "left for the model": format_bytes(fitted.model_budget_bytes),
            "bare runtime": format_bytes(fitted.runtime_bytes),
            "context": counted(fitted.context, "token"),
        }
    )
    headers, cells = table_rows(fitted.rows, fitted.runtime_bytes)
    # A model a column: ten numbers side by side would not fit a page.
    names, *rows = zip(headers, *cells, strict=True)
    yield table_html(names, rows, caption="The models", highlight_columns=[len(names) - 1])
    for remark in fitted.remarks:
        yield note(remark)


def _domains(fitted: Fitted) -> Iterable[Html]:
    headers, cells = domain_rows(fitted.rows)
    yield table_html(headers, cells, caption="Perplexity and exact answers on held-out text")
    yield paragraph(
        "An answer is exact when every token of it, worked steps included, is the model's most likely "
        "one given those before: what greedy generation would write."
    )


def _tried(fitted: Fitted) -> Iterable[Html]:
    measured = sorted(fitted.tried, key=lambda m: m.account_bytes)
    kinds = {"one width for all": _is_uniform, "one block of layers alone": _is_probe}
    series, rest = [], list(measured)
    for name, belongs in kinds.items():
        own = [m for m in rest if belongs(m)]
        rest = [m for m in rest if not belongs(m)]
        series.append(_series(name, own, joined=name.startswith("one width")))
    series.insert(1, _series(f"{_part(fitted)} by {_part(fitted)}", rest, joined=False))
    chosen = fitted.after
    yield line_svg(
        [one for one in series if one.points],
        title="Loss against memory, of everything measured",
        x_label="accounted memory of the model",
        y_label="KL to the original, nats per token",
        highlights=[Highlight(chosen.accounted_bytes, chosen.quality.kl, "chosen")],
        limits=[Limit(fitted.model_budget_bytes, "budget")],
        log_y=True,
        x_unit=_MIB,
        x_format=format_bytes,
    )
    headers, cells = frontier_rows(fitted.frontier, chosen.quality)
    yield table_html(headers, cells, caption="The measured frontier: nothing measured is smaller and better")
    fall = cliff(fitted.frontier, fitted.before.weights_bytes)
    yield paragraph(
        f"A cliff is where KL grows more than {USUAL_GROWTH**2:g}-fold for a sixteenth of the original's "
        f"weights and reaches 0.01 nats; "
        + ("there is none among what was measured." if fall is None else fall.told + ".")
    )


def _series(name: str, measured: list[Measured], *, joined: bool) -> Series:
    points = [(float(m.account_bytes), m.quality.kl) for m in measured]
    return Series(name, points, joined, [m.candidate.label for m in measured])


def _is_uniform(measured: Measured) -> bool:
    return len(set(measured.candidate.choice)) == 1


def _is_probe(measured: Measured) -> bool:
    return measured.candidate.label.startswith("block ")


def _part(fitted: Fitted) -> str:
    """What options are chosen for, in a word."""
    return "tensor" if fitted.columns else "expert"


def _shown(fitted: Fitted) -> list[str]:
    """All options there were for experts, and of the many types of a file those that it has."""
    used = {name for row in fitted.choice_map.values() for name in row if name}
    known = [name for name in fitted.options if not fitted.columns or name in used]
    return [*sorted(used - set(fitted.options)), *known]


def _parts(fitted: Fitted) -> Iterable[Html]:
    layers = list(fitted.choice_map)
    width = max(len(row) for row in fitted.choice_map.values())
    yield category_map_svg(
        [fitted.choice_map[layer] for layer in layers],
        [str(layer) for layer in layers],
        list(fitted.columns or map(str, range(width))),
        categories=_shown(fitted),
        title=f"What was done to each {_part(fitted)}",
        col_name="tensor" if fitted.columns else "expert",
    )


def _samples(fitted: Fitted) -> Iterable[Html]:
    for sample in fitted.samples:
        yield side_by_side([("prompt", sample.prompt), ("before", sample.before), ("after", sample.after)])


def _untouched(fitted: Fitted) -> Iterable[Html]:
    names = fitted.untouched
    if not names:
        yield paragraph("No tensor was left out of the plan.")
        return
    listed = table_html(["tensor"], [[name] for name in names], caption="Tensors copied byte by byte")
    yield details(f"{len(names)} tensors were copied byte by byte", listed)
