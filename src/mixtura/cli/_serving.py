"""What `mixtura serve` and `mixtura chat` share: options, and the model with its engine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from mixtura.cli._tiers import wish_of
from mixtura.errors import SettingError, UserError

if TYPE_CHECKING:
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

_EXTRAS = {"serve": ("fastapi", "uvicorn", "prometheus_client")}


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


def opened(model: str | None, served: Served, *, yes: bool) -> tuple[Opened, str]:
    """A model with its engine, and its name.

    Raises:
        UserError: something of it cannot be.
    """
    if served.adapter is not None and served.memory is not None:
        raise SettingError(
            "--adapter changes weights that --memory leaves on disk; write the model with the adapter in it "
            "by `mixtura merge`, and give that"
        )
    # Before PyTorch is imported: it keeps the process small.
    from mixtura.running.memory.process import settle

    settle()
    from mixtura.report.units import parse_bytes

    cache_bytes = None if served.cache_memory is None else parse_bytes(served.cache_memory)
    from mixtura.running.resolve import resolve_model
    from mixtura.serving.opening import Serving, open_model

    resolved = resolve_model(model, assume_yes=yes)
    serving = Serving(
        memory=wish_of(served.memory, served.cache, served.prefetch, served.trace, 1),
        context=served.context,
        cache_bytes=cache_bytes,
        running=served.running,
        waiting=served.waiting,
        keeps_prefixes=served.keeps,
        bits=served.bits,
    )
    adapter = served.adapter

    def adapt(found: Any) -> Any:
        from mixtura.running.adapters import ready_to_run

        assert adapter is not None
        return ready_to_run(found, adapter, merge=served.merge)

    return open_model(resolved.path, serving, None if adapter is None else adapt), resolved.name
