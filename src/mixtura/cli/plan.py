"""`mixtura plan`: where the experts of a model are to lie on many devices, and what that will cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._places import check_file
from mixtura.errors import UnknownNameError, UserError

if TYPE_CHECKING:
    from mixtura.running.parallel.planning import Option
    from mixtura.running.parallel.pricing import Work
    from mixtura.types.placement import Cluster
    from mixtura.types.trace import Trace


def plan(
    model: str | None = typer.Argument(None, help="A directory, a hub id, or nothing for the specimen."),
    devices: Path = typer.Option(..., help="A YAML file of the cluster; docs/scale.md explains every key."),
    trace: Path | None = typer.Option(
        None, help="What `mixtura observe --save` wrote; without it all experts are taken to be as busy."
    ),
    placements: str = typer.Option("", help="Placements by name, with commas. Default: all."),
    changes: list[str] = typer.Option([], "--set", help="A setting, such as hecate.spare=3."),
    tokens: int = typer.Option(4096, min=1, help="Tokens of a device in a step."),
    inference: bool = typer.Option(
        False, "--inference", help="Price a forward pass, not a step of training."
    ),
    save: Path | None = typer.Option(None, help="Write the best placement, or the one named, to this file."),
    report: Path | None = typer.Option(None, help="Write a page with pictures of the traffic to this file."),
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Say what placements of experts will cost on a cluster, before anything is rented.

    The same for a trace and without one, for a step of training or a pass: seconds, bytes over each kind of
    link, idle time and memory, predicted by a model of links and devices that docs/scale.md explains.

    Example: `mixtura plan ./OLMoE-1B-7B --devices cluster.yaml --trace olmoe.trace --report plan.html`
    """
    for target in (save, report):
        check_file(target)
    names = _names(placements)
    settings = _settings(changes, names)
    from mixtura.running.parallel.planning import compare

    cluster = _cluster(devices)
    seen, work, name = _model(model, trace, tokens, inference=inference, yes=yes)
    options = compare(names, seen, cluster, work, settings=settings, strict=bool(placements))
    best = options[0]
    if best.placement is None:
        raise UserError(f"no placement can be had: {best.reason}")
    if save is not None:
        save.write_text(best.placement.to_json(), encoding="utf-8")
    said = _said(name, trace, cluster, work)
    if report is not None:
        _write(report, options, seen, cluster, work, said, settings)
    if as_json:
        typer.echo(json.dumps({"model": name, "says": said, "options": [one.to_dict() for one in options]}))
        return
    _print(options, said)
    for target in (save, report):
        if target is not None:
            typer.echo(f"written: {target}", err=True)


def _names(placements: str) -> list[str]:
    from mixtura.methods import names

    known = names("placements")
    asked = [one.strip() for one in placements.split(",") if one.strip()] or list(known)
    for one in asked:
        if one not in known:
            raise UnknownNameError("placement", one, known)
    return asked


def _settings(changes: list[str], names: list[str]) -> dict[str, dict[str, object]]:
    from mixtura.methods.settings import key_and_value
    from mixtura.train.config import parse_value

    found: dict[str, dict[str, object]] = {}
    for change in changes:
        key, value = key_and_value(change)
        placement, dot, setting = key.partition(".")
        if not dot and len(names) == 1:
            placement, setting = names[0], key
        if placement not in names:
            raise UnknownNameError("placement to set", placement, names)
        found.setdefault(placement, {})[setting] = parse_value(value, change)
    return found


def _cluster(devices: Path) -> Cluster:
    from mixtura.train.config import read_yaml
    from mixtura.types.placement import cluster_from

    return cluster_from(read_yaml(devices))


def _model(
    model: str | None, trace: Path | None, tokens: int, *, inference: bool, yes: bool
) -> tuple[Trace, Work, str]:
    """How busy the model's experts are, what a step is, and what the model is called."""
    from mixtura.checkpoints.skeleton import open_checkpoint
    from mixtura.checkpoints.summary import summarize
    from mixtura.running.parallel.planning import check_same_model, even_trace
    from mixtura.running.parallel.pricing import Work
    from mixtura.running.resolve import resolve_model
    from mixtura.types.trace import Trace

    resolved = resolve_model(model, assume_yes=yes)
    summary = summarize(open_checkpoint(resolved.path))
    seen = even_trace(summary) if trace is None else Trace.load(trace)
    check_same_model(seen, summary)
    work = Work(
        tokens_per_device=tokens,
        training=not inference,
        other_num_parameters=summary.num_parameters - summary.expert_parameters,
    )
    return seen, work, resolved.name


def _said(name: str, trace: Path | None, cluster: Cluster, work: Work) -> str:
    from mixtura.report import counted

    busy = "all experts taken to be as busy" if trace is None else f"experts as busy as in {trace.name}"
    step = "a step of training" if work.training else "a forward pass"
    return (
        f"Predicted, not measured: {step} of {name} with {counted(work.tokens_per_device, 'token')} a device "
        f"in 16 bits on {counted(cluster.num_devices, 'device')} in {counted(cluster.num_nodes, 'node')}, "
        f"{busy}; nothing overlaps."
    )


def _print(options: tuple[Option, ...], said: str) -> None:
    from mixtura.report.screen import screen, show_table
    from mixtura.running.parallel.planning import COLUMNS, cells

    console = screen()
    console.print(said)
    console.print()
    show_table(console, COLUMNS, [cells(one) for one in options if one.price is not None])
    console.print()
    for one in options:
        console.print(f"{one.name}: {one.reason}")


def _write(
    report: Path,
    options: tuple[Option, ...],
    seen: Trace,
    cluster: Cluster,
    work: Work,
    said: str,
    settings: dict[str, dict[str, object]],
) -> None:
    from mixtura.data.records import readable
    from mixtura.report import Html
    from mixtura.running.parallel.planning import plan_page, traffic_grid

    grids = {
        one.name: traffic_grid(one, seen, cluster, work, **settings.get(one.name, {}))
        for one in options
        if one.placement is not None
    }
    report.write_text(readable(Html(plan_page(options, grids, said))), encoding="utf-8")
