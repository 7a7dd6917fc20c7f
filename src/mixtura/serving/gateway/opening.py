"""A gateway of a configuration: everything that can be wrong is found before anybody asks."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from mixtura.errors import UserError
from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.answering import Gateway, read_secrets
from mixtura.serving.gateway.books import Books
from mixtura.serving.gateway.calling import Caller
from mixtura.serving.gateway.config import VARIABLE, Config
from mixtura.serving.gateway.tracing import Tracer, exporting
from mixtura.serving.gateway.trying import Trier
from mixtura.serving.gateway.watching import Watch
from mixtura.types.models import ModelCard


@final
@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A gateway that is ready."""

    gateway: Gateway
    secrets: Mapping[str, str]
    books: Books
    tracer: Tracer

    async def end(self) -> None:
        """Settle what is under way, and let go of connections; in the loop that served."""
        await self.gateway.trier.finish()
        await self.gateway.trier.caller.close()

    def close(self) -> None:
        """Write what waits to the ledger, and end."""
        self.books.close()
        self.tracer.close()


def open_gateway(
    config: Config,
    cards: Mapping[str, ModelCard],
    environment: Mapping[str, str],
    tracer: Tracer | None = None,
) -> Opened:
    """A gateway that is ready to answer.

    Args:
        config, cards: what there is.
        environment: has the secrets.
        tracer: makes spans, in place of what the configuration says.

    Raises:
        UserError: a secret is missing, a router cannot be opened, or the ledger cannot be reached.
    """
    secrets = read_secrets(config, environment)
    caller = Caller(config.upstreams)
    if tracer is None:
        tracer = exporting() if config.tracing else Tracer()
    books = Books(
        ledger.connect(ledger_url(config, environment)),
        f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
        charge=config.unsettled == "charge",
    )
    try:
        trier = Trier(config, cards, caller=caller, books=books, watch=Watch(), tracer=tracer)
        return Opened(Gateway(config, cards, secrets, trier), secrets, books, tracer)
    except BaseException:
        books.close()
        raise


def ledger_url(config: Config, environment: Mapping[str, str]) -> str:
    """Where the ledger is.

    Raises:
        UserError: the variable that says so is not set, or a password stands in the configuration.
    """
    if not config.ledger.startswith("$"):
        if "@" in config.ledger and ":" in config.ledger.partition("//")[2].partition("@")[0]:
            raise UserError(
                "the ledger's URL has a password in it; put it in an environment variable, such as "
                "LEDGER_URL, and give ledger: $LEDGER_URL"
            )
        return config.ledger
    name = config.ledger[1:]
    if not VARIABLE.fullmatch(name):
        raise UserError("ledger is a URL, or $ and the name of an environment variable that holds one")
    found = environment.get(name, "").strip()
    if not found:
        raise UserError(f"the ledger's URL is in the environment variable {name}, which is not set")
    return found
