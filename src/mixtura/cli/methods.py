"""`mixtura methods`: every method there is, by kind."""

from __future__ import annotations

import json

import typer


def methods(
    kind: str | None = typer.Argument(
        None, help="Show one kind alone, such as routers; without it, all.", show_default=False
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list of objects."),
) -> None:
    """List the methods: routers, balancers, pruners, quantizers, caches and so on.

    Examples:

        mixtura methods                 every method, those of other packages included

        mixtura methods pruners         one kind

        mixtura methods --json          with kind, name, paper, title, summary and tags
    """
    from mixtura.methods import header, kinds, names
    from mixtura.methods import kind as find_kind

    shown = [find_kind(kind)] if kind else kinds()
    headers = [header(family.name, name) for family in shown for name in names(family.name)]
    if as_json:
        typer.echo(json.dumps([item.to_dict() for item in headers], indent=1))
        return
    from mixtura.report.screen import screen, show_table

    console = screen()
    for family in shown:
        rows = [[item.name, item.summary] for item in headers if item.kind == family.name]
        show_table(console, [], rows, title=f"{family.name}: {family.summary}", left=(0, 1), indent=2)
    console.print("\nmixtura show NAME says more of one; mixtura new KIND NAME starts another")
