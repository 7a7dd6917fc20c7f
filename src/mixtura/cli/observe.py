"""`mixtura observe`: which experts a model's tokens reach, on your text or on the text that comes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtura.cli._analyses import Changes, check_room, evidence_of, made, print_reports, tags_of_analyses
from mixtura.cli._places import check_file
from mixtura.methods import header

Analyses = Annotated[
    str, typer.Option(help="Analyses by name, with commas; `mixtura methods analyses` lists them.")
]
StudyMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory the process may take, such as 8GiB, where an analysis runs the model again: experts "
        "beyond it are read from disk. Observing alone reads the model layer by layer."
    ),
]
_SHOWN_SPECIALISTS = 10

if TYPE_CHECKING:
    from mixtura.methods.analyses import Report
    from mixtura.running.observing.describe import Description
    from mixtura.types.trace import Trace


def observe(
    model: str | None = typer.Argument(
        None, help="A directory, a hub id (owner/name, owner/name@revision), or nothing for the specimen."
    ),
    text: Path | None = typer.Option(
        None,
        help="A UTF-8 file, records (.jsonl, .json: text, prompt and answer or completion, instruction and "
        "output, messages, conversations), or a directory of them; without it, text of three domains.",
    ),
    tokens: int = typer.Option(16_384, min=2, help="Tokens to read at most, the same number of each domain."),
    length: int = typer.Option(512, min=2, help="Tokens per sequence at most; longer documents are cut."),
    statistics: list[str] = typer.Option(
        [],
        help="A statistic to take of every choice, by name or .py file; may be repeated. "
        "`mixtura methods statistics` lists them.",
    ),
    analysis: Analyses = "",
    changes: Changes = None,
    save: Path | None = typer.Option(None, help="Write the trace to this file (safetensors)."),
    report: Path | None = typer.Option(None, help="Write a page with heat maps to this file (HTML)."),
    memory: StudyMemory = None,
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show which experts tokens reach: load by layer and domain, experts never chosen, specialists.

    Example: `mixtura observe ./OLMoE-1B-7B --text ./docs --report observed.html`

    `mixtura observe --analysis routing_consistency,load`

    `mixtura observe --analysis route_explainer --set text=2 --set token=40`
    """
    check_file(save)
    check_file(report)
    _check_known(statistics)
    wanted = [name.strip() for name in analysis.split(",") if name.strip()]
    needs, analyses = tags_of_analyses(wanted, observing=True), made(wanted, changes)
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.running.observing.analyzing import DEFAULT_LOGITS
    from mixtura.running.observing.checkpoint import observe_checkpoint, read_text
    from mixtura.running.resolve import resolve_model

    resolved = resolve_model(model, assume_yes=yes)
    view = open_checkpoint(resolved.path)
    check_room(view, wanted, needs, memory)
    batch = read_text(view, text, max_tokens=tokens, max_length=length)
    trace = observe_checkpoint(
        view,
        batch,
        statistics=list(dict.fromkeys([*statistics, *needs["statistic"]])),
        keep_choices="choices" in needs["needs"],
        keep_logits=DEFAULT_LOGITS if "logits" in needs["needs"] else 0,
        progress=not as_json,
    )
    with evidence_of(view, trace, batch, needs, memory) as evidence:
        reports = {name: one.measure(evidence) for name, one in analyses.items()}
    _tell(resolved.name, trace, reports, save=save, page=report, as_json=as_json)


def _tell(
    name: str,
    trace: Trace,
    reports: dict[str, Report],
    *,
    save: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Write and print what was observed."""
    from mixtura.data.records import readable
    from mixtura.running.observing.describe import describe
    from mixtura.running.observing.report import observation_page

    description = describe(trace)
    if save is not None:
        trace.save(save)
    if page is not None:
        page.write_text(readable(observation_page(name, description, reports)), encoding="utf-8")
    if as_json:
        more = {"analyses": {key: one.to_dict() for key, one in reports.items()}} if reports else {}
        typer.echo(json.dumps({"model": name, **description.to_dict(), **more}))
        return
    _print(name, description)
    print_reports(reports)
    for what, target in (("trace", save), ("report", page)):
        if target is not None:
            typer.echo(f"{what}: {target}", err=True)


def _check_known(statistics: list[str]) -> None:
    """Refuse a statistic that is not there before the long work begins."""
    for name in statistics:
        header("statistics", name)


def _print(name: str, description: Description) -> None:
    from mixtura.report import counted
    from mixtura.report.screen import screen, show_table
    from mixtura.running.observing.report import (
        EXPLANATION,
        domain_rows,
        layer_by_domain_rows,
        layer_rows,
        specialist_rows,
    )

    console = screen()
    trace = description.trace
    read = f"{counted(sum(trace.num_tokens), 'token')} of {counted(len(trace.domains), 'domain')}"
    console.print(f"{name}: {read}", style="bold")
    tables = {
        "By layer": layer_rows(description),
        "By domain, over all layers": domain_rows(description),
    }
    if len(trace.domains) > 1:
        tables["Entropy by layer and domain (never chosen)"] = layer_by_domain_rows(description)
    if description.specialists:
        header, rows = specialist_rows(description)
        tables["Most specialised experts"] = header, rows[:_SHOWN_SPECIALISTS]
    for title, (header, rows) in tables.items():
        words = [place for place, name in enumerate(header) if name == "domain"]
        console.print()
        show_table(console, header, rows, title=title, left=words)
    console.print(f"\n{EXPLANATION}", style="dim")
