"""`mixtura serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.cli._generating import Adapter, Bits, Cache, Memory, Prefetch, TraceFile, Unmerged
from mixtura.cli._serving import (
    CacheMemory,
    Concurrency,
    Context,
    Served,
    opened,
    require_extra,
)
from mixtura.cli._tiers import DEFAULT_CACHE, NO_PREFETCH, check_words
from mixtura.errors import MixturaWarning

if TYPE_CHECKING:
    from mixtura.serving.opening import Opened


def serve(
    model: str | None = typer.Argument(
        None, help="Directory or hub id; without it, the specimen.", show_default=False
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; the default is for this machine only."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port; 0 takes one that is free."),
    memory: Memory = None,
    cache: Cache = DEFAULT_CACHE,
    prefetch: Prefetch = NO_PREFETCH,
    trace: TraceFile = None,
    context: Context = None,
    cache_memory: CacheMemory = None,
    concurrency: Concurrency = 16,
    queue: int = typer.Option(64, min=0, help="Requests that may wait; more are refused with 429."),
    max_tokens: int = typer.Option(1024, min=1, help="Tokens of an answer where a request does not say."),
    max_body: str = typer.Option("4MiB", help="Largest body of a request."),
    name: str | None = typer.Option(None, help="What clients call the model; by default as it is given."),
    keys_file: Path | None = typer.Option(
        None, help="A file of API keys, one a line; MIXTURA_API_KEYS in the environment has some, too."
    ),
    no_prefix_cache: bool = typer.Option(False, "--no-prefix-cache", help="Read every prompt anew."),
    grace: float = typer.Option(30.0, min=0.0, help="Seconds that answers have to finish after SIGTERM."),
    bits: Bits = None,
    adapter: Adapter = None,
    unmerged: Unmerged = False,
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
) -> None:
    """Serve a model to OpenAI's clients: chat and text completions, metrics, and a page to watch it at /.

    Examples: `mixtura serve`

    `mixtura serve ./Qwen3-30B-A3B --memory 8GiB --context 8192`
    """
    check_words(memory, cache, prefetch, trace)
    from mixtura.report.units import parse_bytes

    most_body = parse_bytes(max_body)
    require_extra("serve")
    from mixtura.serving.addresses import bound, is_loopback, read_keys

    keys = read_keys(keys_file)
    listening = bound(host, port)
    with listening:
        served = Served(
            memory=memory, cache=cache, prefetch=prefetch, trace=trace, context=context,
            cache_memory=cache_memory, running=concurrency, waiting=queue, keeps=not no_prefix_cache,
            bits=bits, adapter=adapter, merge=not unmerged,
        )  # fmt: skip
        found, own_name = opened(model, served, yes=yes)
        is_local = is_loopback(host)
        if not is_local and not keys:
            _warn_of_strangers(host)
        _run(found, listening, name or own_name, keys, is_local, (max_tokens, most_body, grace))


def _warn_of_strangers(host: str) -> None:
    warnings.warn(
        f"anybody who reaches {host} can use this server: it has no API keys (MIXTURA_API_KEYS or "
        "--keys-file)",
        MixturaWarning,
        stacklevel=1,
    )


def _run(
    found: Opened,
    listening: Any,
    name: str,
    keys: tuple[str, ...],
    is_local: bool,
    rest: tuple[int, int, float],
) -> None:
    from mixtura.serving.api.app import build_app
    from mixtura.serving.api.service import Service, Settings
    from mixtura.serving.listening import serve_until_told
    from mixtura.serving.watching import Watch

    max_tokens, most_body, grace = rest
    settings = Settings(name=name, default_tokens=max_tokens, most_body_bytes=most_body)
    service = Service(found.engine, found.tokenizer, settings)
    app = build_app(service, Watch(found.engine, name, found.loads), keys=keys, is_local=is_local)
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    try:
        serve_until_told(
            app, listening, grace, lambda: _say(found, f"http://{shown}:{port}", name, bool(keys))
        )
    finally:
        typer.echo("ending", err=True)
        found.engine.close(0)


def _say(found: Opened, address: str, name: str, has_keys: bool) -> None:
    from mixtura.cli._tiers import tier_lines
    from mixtura.report.units import format_bytes

    engine = found.engine
    for line in tier_lines(engine.model)[:1]:
        typer.echo(line, err=True)
    together = "together" if engine.passes.together else "in turns, as this family's caches want it"
    typer.echo(
        f"up to {engine.limits.running} requests run {together}, {engine.limits.waiting} wait; "
        f"{engine.limits.context} tokens of context, {format_bytes(engine.prefixes.limit_bytes)} for keys "
        "and values",
        err=True,
    )
    wants = ", with an API key" if has_keys else ""
    typer.echo(f"serving {name} at {address}/v1{wants}; {address}/ shows what it does")
