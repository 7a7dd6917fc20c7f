"""What `mixtura serve` and `mixtura chat` share: options, and the model with its engine."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from mixtura.cli._settings import parse_settings
from mixtura.cli._tiers import wish_of
from mixtura.errors import MixturaWarning, SettingError, UserError

if TYPE_CHECKING:
    from mixtura.methods.decoders import Decoder
    from mixtura.serving.opening import Opened

Context = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer of one request; by default the model's, up to 4096."),
]
CacheMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for keys and values of all requests, such as 1GiB; by default four full contexts."
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Requests that run together.")]

Host = Annotated[str, typer.Option(help="Address to listen on; the default is for this machine only.")]
Grace = Annotated[float, typer.Option(min=0.0, help="Seconds that answers have to finish after SIGTERM.")]
Keys = Annotated[
    Path | None,
    typer.Option(help="A file of API keys, one a line; MIXTURA_API_KEYS in the environment has some, too."),
]

ServedModel = Annotated[
    str | None,
    typer.Argument(help="Directory or hub id; without it, the specimen.", show_default=False),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        help="An adapter's directory; NAME=DIR, as often as you like, for requests to choose as model."
    ),
]
Calibrations = Annotated[
    list[Path],
    typer.Option(
        help="A file that `mixtura calibrate` made, for decoders that need one; as often as you like."
    ),
]

_SERVING = ("fastapi", "uvicorn", "prometheus_client")
_EXTRAS = {"serve": _SERVING, "gateway": (*_SERVING, "aiohttp", "limits", "sqlalchemy", "yaml")}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How a model is to be opened, as the command line says it."""

    memory: str | None
    cache: str
    prefetch: str
    trace: Path | None
    context: int | None
    cache_memory: str | None
    running: int = 1
    waiting: int = 1
    keeps: bool = True
    bits: int | None = None
    adapter: Path | None = None
    merge: bool = True
    adapters: Mapping[str, Path] = field(default_factory=dict)
    calibrations: tuple[Path, ...] = ()
    decoder: Decoder | None = None


def warn_of_strangers(host: str, how: str) -> None:
    """Warn of a server without keys that others reach; ``how`` says where keys are given."""
    warnings.warn(
        f"anybody who reaches {host} can use this server: it has no API keys ({how})",
        MixturaWarning,
        stacklevel=2,
    )


def tell(line: str, *, err: bool = True) -> None:
    """Say something; a log that cannot be written, as on a full disk, does not end a server."""
    with contextlib.suppress(OSError):
        typer.echo(line, err=err)


def let_go_of_full_disks() -> None:
    """Do not try once more, when the process ends, to write what could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def shown_address(listening: Any) -> str:
    """Where a socket listens, as an address of HTTP."""
    address, port = listening.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def require_extra(extra: str) -> None:
    """Refuse a command whose packages are not installed.

    Raises:
        UserError: one is missing, with how to install it.
    """
    missing = [name for name in _EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install 'mixtura[{extra}]'"
        )


def named_adapters(given: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """The one adapter that is served, or those that requests choose, by name.

    Raises:
        SettingError: several are given, and not each with a name of its own.
    """
    named: dict[str, Path] = {}
    for one in given:
        name, sign, folder = one.partition("=")
        if Path(one).is_dir() or not sign:
            if len(given) > 1:
                raise SettingError(
                    f"of several adapters each needs a name that requests choose it by: --adapter NAME={one}"
                )
            return Path(one), {}
        if not name or name in named:
            raise SettingError(f"--adapter {one} needs a name of its own before the =")
        named[name] = Path(folder)
    return None, named


def served_decoder(names: str, changes: list[str], calibrations: Sequence[Path]) -> Decoder | None:
    """What decides how answers are made where a request does not say; None for the model as it is.

    Raises:
        UserError: there is no such decoder, it cannot go token by token, or it lacks what it needs.
    """
    for path in calibrations:
        if not path.is_file():
            raise UserError(f"there is no file {path}; make one by 'mixtura calibrate'")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        if changes:
            raise UserError("--set is for a --decoder; name one")
        return None
    if changes and len(wanted) > 1:
        raise UserError("--set is for one decoder; leave it out, or name one")
    from mixtura.methods import create
    from mixtura.serving.engine.deciding import require_served

    settings = parse_settings(changes)
    return require_served([create("decoders", name, **settings) for name in wanted])


def opened(model: str | None, served: Served, *, yes: bool) -> tuple[Opened, str]:
    """A model with its engine, and its name.

    Raises:
        UserError: something of it cannot be.
    """
    if served.adapter is not None and served.memory is not None:
        raise SettingError(
            "--adapter changes weights that --memory leaves on disk; write the model with the adapter in it "
            "by `mixtura merge`, and give that, or let requests choose it by --adapter NAME=DIR"
        )
    # Before PyTorch is imported: it keeps the process small.
    from mixtura.running.memory.process import settle

    settle()
    from mixtura.report.units import parse_bytes

    cache_bytes = None if served.cache_memory is None else parse_bytes(served.cache_memory)
    from mixtura.running.adapters import adapter_config
    from mixtura.running.resolve import resolve_model
    from mixtura.serving.opening import Serving, open_model

    for folder in served.adapters.values():
        adapter_config(folder)
    resolved = resolve_model(model, assume_yes=yes)
    serving = Serving(
        memory=wish_of(served.memory, served.cache, served.prefetch, served.trace, 1),
        context=served.context,
        cache_bytes=cache_bytes,
        running=served.running,
        waiting=served.waiting,
        keeps_prefixes=served.keeps,
        bits=served.bits,
        adapters=served.adapters,
        calibrations=served.calibrations,
        decoder=served.decoder,
    )
    adapter = served.adapter

    def adapt(found: Any) -> Any:
        from mixtura.running.adapters import ready_to_run

        assert adapter is not None
        return ready_to_run(found, adapter, merge=served.merge)

    return open_model(resolved.path, serving, None if adapter is None else adapt), resolved.name
