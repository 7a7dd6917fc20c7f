"""`mixtura serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from mixtura.cli._generating import (
    Bits,
    Cache,
    Changes,
    DecoderNames,
    Memory,
    Prefetch,
    TraceFile,
    Unmerged,
)
from mixtura.cli._serving import (
    Adapters,
    CacheMemory,
    Calibrations,
    Concurrency,
    Context,
    Grace,
    Host,
    Keys,
    Served,
    ServedModel,
    let_go_of_full_disks,
    named_adapters,
    opened,
    require_extra,
    served_decoder,
    shown_address,
    tell,
    warn_of_strangers,
)
from mixtura.cli._tiers import DEFAULT_CACHE, NO_PREFETCH, check_words
from mixtura.errors import SettingError

if TYPE_CHECKING:
    from mixtura.methods.decoders import Decoder
    from mixtura.serving.opening import Opened


def serve(
    model: ServedModel = None,
    host: Host = "127.0.0.1",
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
    keys_file: Keys = None,
    no_prefix_cache: bool = typer.Option(False, "--no-prefix-cache", help="Read every prompt anew."),
    grace: Grace = 30.0,
    bits: Bits = None,
    adapter: Adapters = [],  # noqa: B006
    unmerged: Unmerged = False,
    decoder: DecoderNames = "",
    changes: Changes = [],  # noqa: B006 - typer reads it as a default and makes lists of its own
    calibration: Calibrations = [],  # noqa: B006
    yes: bool = typer.Option(False, "--yes", help="Download a model from the hub without asking."),
) -> None:
    """Serve a model to OpenAI's clients: chat and text completions, metrics, and a page to watch it at /.

    Examples: `mixtura serve`

    `mixtura serve ./Qwen3-30B-A3B --memory 8GiB --context 8192`

    `mixtura serve --decoder scmoe --set beta=0.5`
    """
    check_words(memory, cache, prefetch, trace)
    from mixtura.report.units import parse_bytes

    most_body = parse_bytes(max_body)
    require_extra("serve")
    from mixtura.serving.addresses import bound, is_loopback, read_keys

    keys = read_keys(keys_file)
    one, named = named_adapters(adapter)
    deciding = served_decoder(decoder, changes, calibration)
    listening = bound(host, port)
    with listening:
        served = Served(
            memory=memory, cache=cache, prefetch=prefetch, trace=trace, context=context,
            cache_memory=cache_memory, running=concurrency, waiting=queue, keeps=not no_prefix_cache,
            bits=bits, adapter=one, merge=not unmerged, adapters=named, calibrations=tuple(calibration),
            decoder=deciding,
        )  # fmt: skip
        found, own_name = opened(model, served, yes=yes)
        is_local = is_loopback(host)
        if not is_local and not keys:
            warn_of_strangers(host, "MIXTURA_API_KEYS or --keys-file")
        answers = _Answers(name or own_name, tuple(named), deciding, max_tokens, most_body)
        _run(found, listening, answers, keys, is_local, grace)


class _Answers(NamedTuple):
    """How answers are given."""

    name: str
    adapters: tuple[str, ...]
    decoder: Decoder | None
    max_tokens: int
    most_body: int


def _told_apart(name: str, adapters: Collection[str]) -> str:
    if name in adapters:
        raise SettingError(f"an adapter and the model are both called {name!r}; give the model a --name")
    return name


def _run(
    found: Opened,
    listening: Any,
    settings: _Answers,
    keys: tuple[str, ...],
    is_local: bool,
    grace: float,
) -> None:
    from mixtura.serving.api.app import build_app
    from mixtura.serving.api.service import Service, Settings
    from mixtura.serving.listening import serve_until_told
    from mixtura.serving.watching import Watch

    name = _told_apart(settings.name, settings.adapters)
    service = Service(
        found.engine,
        found.tokenizer,
        Settings(
            name=name, adapters=settings.adapters, decoder=settings.decoder,
            default_tokens=settings.max_tokens, most_body_bytes=settings.most_body,
        ),
    )  # fmt: skip
    app = build_app(service, Watch(found.engine, name, found.loads), keys=keys, is_local=is_local)
    address = shown_address(listening)
    try:
        serve_until_told(app, listening, grace, lambda: _say(found, address, name, bool(keys)))
    finally:
        tell("ending")
        found.engine.close(0)
        let_go_of_full_disks()


def _say(found: Opened, address: str, name: str, has_keys: bool) -> None:
    from mixtura.cli._tiers import tier_lines
    from mixtura.report.units import format_bytes

    engine = found.engine
    for line in tier_lines(engine.model)[:1]:
        tell(line)
    together = "together" if engine.passes.together else "in turns, as this family's caches want it"
    tell(
        f"up to {engine.limits.running} requests run {together}, {engine.limits.waiting} wait; "
        f"{engine.limits.context} tokens of context, {format_bytes(engine.prefixes.limit_bytes)} for keys "
        "and values"
    )
    wants = ", with an API key" if has_keys else ""
    tell(f"serving {name} at {address}/v1{wants}; {address}/ shows what it does", err=False)
