"""`mixtura check`: run a kind's contract on a method."""

from __future__ import annotations

import json

import typer


def check(
    kind: str = typer.Argument(help="The kind, such as router."),
    name: str = typer.Argument(help="A method's name, or the path of its .py file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list of objects."),
) -> None:
    """Check that a method keeps every promise of its kind; exit code 1 if it does not.

    Examples:

        mixtura check router top_k

        mixtura check pruner ./my_pruner.py
    """
    from mixtura.authoring.contracts import run

    outcomes = run(kind, name)
    if as_json:
        fields = ("check", "status", "reason")
        typer.echo(json.dumps([{f: getattr(item, f) for f in fields} for item in outcomes], indent=1))
    else:
        from mixtura.report.screen import screen, show_table

        marks = {"pass": "pass", "fail": "FAIL", "gap": "known gap", "stale gap": "FAIL"}
        rows = [[item.check, marks[item.status], item.reason] for item in outcomes]
        show_table(screen(), [], rows, left=(0, 1, 2))
    failed = sum(not item.ok for item in outcomes)
    typer.echo(f"{len(outcomes) - failed} of {len(outcomes)} checks are as they should be", err=True)
    if failed:
        raise typer.Exit(1)
