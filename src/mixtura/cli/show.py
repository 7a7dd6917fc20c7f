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
    from mixtura.report.screen import screen, show_table

    console = screen()
    console.print(f"{kind(found.kind).singular} {found.name}", style="bold")
    console.print(found.title if found.paper is None else f"Paper: {found.title}")
    console.print(f"\n{found.doc}\n")
    console.print("Settings:", style="bold")
    for setting in found.settings:
        console.print(f"    {setting.name}: {setting.type} = {setting.default}")
    if not found.settings:
        console.print("    none")
    console.print("\nKnown gaps:", style="bold")
    show_table(console, [], list(map(list, found.gaps.items())) or [["none"]], left=(0, 1), indent=4)
    if found.tags:
        console.print(f"\nTags: {', '.join(found.tags)}")
    console.print(f"\nFile: {found.path}")
