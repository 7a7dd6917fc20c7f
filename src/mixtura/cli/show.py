"""`mixtura show`: all there is to know about one method."""

from __future__ import annotations

import json

import typer


def show(
    name: str = typer.Argument(help="The method, such as reap, or KIND/NAME where several have the name."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show one method: what it does, its settings, its paper, known gaps and where its file is.

    Examples:

        mixtura show reap

        mixtura show balancers/switch_loss
    """
    from mixtura.methods import kind, locate

    found = locate(name)
    if as_json:
        settings = [{"name": s.name, "type": s.type, "default": s.default} for s in found.settings]
        more = {"doc": found.doc, "settings": settings, "gaps": dict(found.gaps), "path": str(found.path)}
        typer.echo(json.dumps(found.to_dict() | more, indent=1))
        return
    paper = "no paper" if found.paper is None else f"paper {found.paper}"
    typer.secho(f"{kind(found.kind).singular} {found.name}", bold=True)
    typer.echo(f"{found.title} ({paper})\n\n{found.doc}\n")
    typer.secho("Settings:", bold=True)
    for setting in found.settings:
        typer.echo(f"    {setting.name}: {setting.type} = {setting.default}")
    if not found.settings:
        typer.echo("    none")
    typer.secho("\nKnown gaps:", bold=True)
    for check, reason in found.gaps.items():
        typer.echo(f"    {check}: {reason}")
    if not found.gaps:
        typer.echo("    none")
    if found.tags:
        typer.echo(f"\nTags: {', '.join(found.tags)}")
    typer.echo(f"\nFile: {found.path}")
