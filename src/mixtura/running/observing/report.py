"""A trace as tables for the terminal and as a page with heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mixtura import __version__
from mixtura.methods.analyses import Report
from mixtura.report import (
    Html,
    Section,
    counted,
    facts,
    heatmap_svg,
    human_count,
    human_number,
    human_percent,
    note,
    page,
    paragraph,
    table_html,
)
from mixtura.running.observing.describe import Description
from mixtura.running.observing.findings import finding_sections

_FEW_TOKENS_PER_EXPERT = 50
_UNKNOWN = "–"

Rows = list[list[str]]


def layer_rows(description: Description) -> tuple[list[str], Rows]:
    """Header and rows of the table of layers."""
    rows = []
    for number, layer in enumerate(description.trace.layers):
        row = description.load.rows[number]
        cells = [
            str(layer.index),
            str(layer.shape.num_experts),
            str(layer.top_k),
            _times(row["max_over_mean"]),
            _share(row["entropy"]),
            _number(row["dead"]),
            _share(description.specialisation[number]),
        ]
        rows.append(cells)
    return ["layer", "experts", "chosen", "busiest", "entropy", "never chosen", "specialisation"], rows


def layer_by_domain_rows(description: Description) -> tuple[list[str], Rows]:
    """Header and rows of the table of layers by domain: entropy, and in brackets experts never chosen."""
    domains = description.trace.domains
    rows = []
    for number, layer in enumerate(description.trace.layers):
        found = [description.load_by_domain[domain].rows[number] for domain in domains]
        cells = [f"{_share(row['entropy'])} ({_number(row['dead'])})" for row in found]
        rows.append([str(layer.index), *cells])
    return ["layer", *domains], rows


def domain_rows(description: Description) -> tuple[list[str], Rows]:
    """Header and rows of the table of domains."""
    rows = []
    for domain, tokens in zip(description.trace.domains, description.trace.num_tokens, strict=True):
        scalars = description.load_by_domain[domain].scalars
        cells = [_times(scalars["max_over_mean"]), _share(scalars["entropy"]), _number(scalars["dead"])]
        rows.append([domain, f"{tokens:,}", *cells])
    return ["domain", "tokens", "busiest", "entropy", "never chosen"], rows


def specialist_rows(description: Description) -> tuple[list[str], Rows]:
    """Header and rows of the table of specialised experts."""
    rows = [
        [
            f"{found.layer}",
            f"{found.expert}",
            found.domain,
            human_percent(found.share_of_use),
            human_percent(found.share_of_tokens),
        ]
        for found in description.specialists
    ]
    return ["layer", "expert", "domain", "of its use", "of the domain's tokens"], rows


EXPLANATION = (
    "busiest: the most used expert's load over the mean; entropy: 1 when all experts are used alike, 0 when "
    "one is; specialisation: 0 when all domains use the same experts, 1 when they share none."
)


def observation_page(name: str, description: Description, reports: Mapping[str, Report] | None = None) -> str:
    """The page of a trace: facts, a heat map for all text and each domain, tables, analyses."""
    trace = description.trace
    sections = [
        Section("At a glance", _glance(description)),
        Section("Which experts are used", _load_maps(description)),
        Section("By layer", [table_html(*layer_rows(description), caption=EXPLANATION)]),
        Section("By domain", _domain_tables(description)),
    ]
    if description.specialists:
        sections.append(Section("Most specialised experts", _specialists(description)))
    if any(layer.statistics for layer in trace.layers):
        sections.append(Section("Statistics", _statistic_maps(description)))
    sections += finding_sections(reports or {})
    return page(
        f"What the experts of {name} do",
        sections,
        summary=f"Observed on {sum(trace.num_tokens):,} tokens of {counted(len(trace.domains), 'domain')}: "
        f"{', '.join(trace.domains)}.",
        footer=f"mixtura {__version__}, model {trace.source_digest}",
    )


def _glance(description: Description) -> list[Html]:
    trace, scalars = description.trace, description.load.scalars
    num_experts = sum(layer.shape.num_experts for layer in trace.layers)
    known = [value for value in description.specialisation if value is not None]
    blocks = [
        facts(
            {
                "family": trace.model_type,
                "layers with experts": str(len(trace.layers)),
                "experts": f"{num_experts:,}",
                "tokens": human_count(sum(trace.num_tokens)),
                "mean entropy": _share(scalars["entropy"]),
                "busiest expert": _times(scalars["max_over_mean"]),
                "never chosen": f"{_number(scalars['dead'])} of {num_experts:,}",
                "mean specialisation": _share(sum(known) / len(known)) if known else _UNKNOWN,
            }
        )
    ]
    fewest = min(layer.load.sum().item() / layer.shape.num_experts for layer in trace.layers)
    if fewest < _FEW_TOKENS_PER_EXPERT:
        blocks.append(
            note(
                f"This text is short: {fewest:.0f} choices for each expert on average. An expert that was "
                f"never chosen here may be chosen on other text."
            )
        )
    return blocks


def _load_maps(description: Description) -> list[Html]:
    trace = description.trace
    blocks = [
        paragraph(
            "Each cell is an expert: how often it was chosen, against an even spread over the experts of its "
            "layer. 2× was chosen twice as often as the mean."
        )
    ]
    if len(trace.domains) > 1:
        blocks.append(
            _map(description, "All domains", [layer.load for layer in trace.layers], "never chosen")
        )
    for number, domain in enumerate(trace.domains):
        loads = [layer.counts[number] for layer in trace.layers]
        blocks.append(_map(description, f"Domain {domain}", loads, "never chosen"))
    return blocks


def _domain_tables(description: Description) -> list[Html]:
    told = "Over all layers: the worst balance, the mean entropy, the sum of experts never chosen."
    blocks = [table_html(*domain_rows(description), caption=told)]
    if len(description.trace.domains) > 1:
        told = "Entropy by layer and domain, in brackets the experts never chosen."
        blocks.append(table_html(*layer_by_domain_rows(description), caption=told))
    return blocks


def _specialists(description: Description) -> list[Html]:
    told = "Share of an expert's use that comes from one domain, all domains weighing the same."
    return [table_html(*specialist_rows(description), caption=told)]


def _statistic_maps(description: Description) -> list[Html]:
    layers = description.trace.layers
    names = dict.fromkeys(name for layer in layers for name in layer.statistics)
    blocks = [paragraph("Each cell is an expert's statistic against the mean of its layer.")]
    blocks += [_map(description, name, [layer.statistic(name) for layer in layers], "0") for name in names]
    return blocks


def _map(description: Description, title: str, values: Sequence[Tensor], zero: str) -> Html:
    """A heat map of each layer's values over their mean."""
    layers = description.trace.layers
    ratios = [(row.double() / row.double().mean().clamp(min=1e-300)).tolist() for row in values]
    widest = max(layer.shape.num_experts for layer in layers)
    padded = [row + [float("nan")] * (widest - len(row)) for row in ratios]
    return heatmap_svg(
        padded,
        [str(layer.index) for layer in layers],
        [str(expert) for expert in range(widest)],
        title=title,
        scale="ratio",
        zero_label=zero,
        number_format=lambda value: _times(value),
    )


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else human_number(value)


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{abs(value):.3f}"


def _times(value: float | None) -> str:
    return _UNKNOWN if value is None or value != value else f"{value:.2f}×"
