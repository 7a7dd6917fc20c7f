"""`mixtura analyze`: what traces and tables say that are on disk already, of one checkpoint or of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._analyses import Changes, made, print_reports, tags_of_analyses
from mixtura.cli._places import check_file
from mixtura.errors import UserError

if TYPE_CHECKING:
    from mixtura.methods.analyses import Report


def analyze(
    traces: list[Path] = typer.Argument(
        None, help="Traces that `mixtura observe --save` wrote; of several checkpoints the last one last."
    ),
    analysis: str = typer.Option(
        ..., help="Analyses by name, with commas; `mixtura methods analyses` lists them."
    ),
    changes: Changes = None,
    runs: Path | None = typer.Option(
        None, help="A table of runs, for analyses that read one: JSON, JSON lines or CSV."
    ),
    steps: str = typer.Option("", help="Steps of training, one a trace, with commas, if traces do not say."),
    report: Path | None = typer.Option(None, help="Write a page with plots to this file (HTML)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Analyse what was observed before: traces of one model, of several checkpoints, or a table of runs.

    Example: `mixtura analyze step-100.trace step-900.trace --analysis router_dynamics --report page.html`

    `mixtura analyze --analysis speedup_choice --runs decode.json --set 'features=["num_tokens"]'`
    """
    check_file(report)
    names = [name.strip() for name in analysis.split(",") if name.strip()]
    if not names:
        raise UserError("name an analysis by --analysis; 'mixtura methods analyses' lists them")
    tags_of_analyses(names, observing=False)
    analyses = made(names, changes)
    from mixtura.methods.analyses import Evidence
    from mixtura.running.observing.analyzing import rows_of, steps_of
    from mixtura.types.trace import Trace

    found = tuple(Trace.load(one) for one in traces or ())
    evidence = Evidence(traces=found, steps=_steps(steps) or steps_of(found), runs=rows_of(runs))
    reports = {name: one.measure(evidence) for name, one in analyses.items()}
    _tell(reports, [one.name for one in traces or ()] or [str(runs or "")], report, as_json=as_json)


def _steps(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in text.split(",") if one.strip())
    except ValueError:
        raise UserError(f"--steps must be numbers with commas, such as 100,200, got {text!r}") from None


def _tell(reports: dict[str, Report], sources: list[str], target: Path | None, *, as_json: bool) -> None:
    """Write and print what was found."""
    if target is not None:
        from mixtura.data.records import readable
        from mixtura.running.observing.findings import findings_page

        made_of = ", ".join(one for one in sources if one)
        html = findings_page("Analyses", reports, summary=f"Of {made_of}." if made_of else "")
        target.write_text(readable(html), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"analyses": {name: one.to_dict() for name, one in reports.items()}}))
        return
    print_reports(reports)
    if target is not None:
        typer.echo(f"report: {target}", err=True)
