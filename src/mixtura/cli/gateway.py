"""`mixtura gateway`: one address before many models, with budgets that hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._serving import (
    Grace,
    Host,
    let_go_of_full_disks,
    require_extra,
    shown_address,
    tell,
    warn_of_strangers,
)
from mixtura.errors import OutputError, UserError

if TYPE_CHECKING:
    from mixtura.serving.gateway.config import Config
    from mixtura.serving.gateway.opening import Opened


def gateway(
    config: Path = typer.Option(..., "--config", help="YAML: upstreams, models, routers, policies, keys."),
    host: Host = "127.0.0.1",
    port: int = typer.Option(8100, min=0, max=65535, help="Port; 0 takes one that is free."),
    max_body: str = typer.Option("16MiB", help="Largest body of a request."),
    grace: Grace = 30.0,
    check: bool = typer.Option(False, "--check", help="Read the configuration and the ledger, and end."),
    log: Path | None = typer.Option(
        None, help="Write what was decided, what it cost and how good it was to this .jsonl, and end."
    ),
) -> None:
    """Serve many models behind one OpenAI-compatible address: routed, combined, counted, within budgets.

    Examples: `mixtura gateway --config gateway.yaml`

    `mixtura gateway --config gateway.yaml --log log.jsonl`, then `mixtura route eval router log.jsonl`
    """
    from mixtura.report.units import parse_bytes

    most_body = parse_bytes(max_body)
    require_extra("gateway")
    from mixtura.serving.gateway.config import read_config

    found, cards = read_config(config)
    if log is not None:
        _write_log(found, log)
        return
    from mixtura.serving.addresses import bound, is_loopback
    from mixtura.serving.gateway.opening import open_gateway

    if check:
        open_gateway(found, cards, os.environ).close()
        typer.echo(f"{config} can be served: {', '.join(found.names)}")
        return
    listening = bound(host, port)
    with listening:
        opened = open_gateway(found, cards, os.environ)
        is_local = is_loopback(host)
        if not is_local and not opened.secrets:
            warn_of_strangers(host, f"keys in {config}")
        _run(opened, listening, most_body, grace, is_local)


def _run(opened: Opened, listening: Any, most_body: int, grace: float, is_local: bool) -> None:
    from mixtura.serving.gateway.app import build_app
    from mixtura.serving.listening import serve_until_told

    app = build_app(opened.gateway, opened.secrets, most_body_bytes=most_body, is_local=is_local)
    address = shown_address(listening)

    def say() -> None:
        wants = ", with an API key" if opened.secrets else ""
        names = ", ".join(opened.gateway.config.names)
        tell(f"serving {names} at {address}/v1{wants}; {address}/ shows what it does", err=False)

    try:
        serve_until_told(app, listening, grace, say, opened.end)
    finally:
        tell("ending")
        opened.close()
        let_go_of_full_disks()


def _write_log(config: Config, path: Path) -> None:
    """What the ledger knows of prompts, as `mixtura route` reads tables."""
    if path.exists():
        raise OutputError(f"{path} is there already; give another file for the log")
    from mixtura.serving.gateway import ledger
    from mixtura.serving.gateway.opening import ledger_url
    from mixtura.serving.gateway.watching import outcomes

    engine = ledger.connect(ledger_url(config, os.environ))
    with engine.connect() as connection:
        rows = list(outcomes(connection))
    engine.dispose()
    if not rows:
        raise UserError(
            "the ledger has no prompts that a router chose for; set keep_text: true, and ask for a router"
        )
    try:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    typer.echo(f"{len(rows)} prompts in {path}")
