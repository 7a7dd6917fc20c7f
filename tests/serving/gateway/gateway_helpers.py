"""A real gateway in a thread of this process, and what it answers."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uvicorn

from mixtura.serving.addresses import bound
from mixtura.serving.gateway.app import build_app
from mixtura.serving.gateway.config import parse_config
from mixtura.serving.gateway.ledger import CALLS, balances
from mixtura.serving.gateway.opening import Opened, open_gateway
from mixtura.serving.listening import _Server
from mixtura.types.models import PICO_PER_DOLLAR

PATIENCE_S = 60
# Of tests; each key's secret is its name.
ENVIRONMENT = {f"KEY_{name.upper()}": name for name in ("alice", "bob", "admin")}
# Prices at which a token costs a thousandth of a cent: 10^7 pico-dollars.
PRICED = {"input_price": 10.0, "output_price": 10.0}
TOKEN = 10 * PICO_PER_DOLLAR // 10**6


def configured(address: str, *models: str, **more: Any) -> dict[str, Any]:
    """A configuration of priced models behind one address."""
    listed = {name: {"upstream": "loop", "template_tokens": 0, **PRICED} for name in models}
    for name, given in more.pop("cards", {}).items():
        listed[name] |= given
    upstream = {"address": address, "stall_s": 1.0, **more.pop("upstream", {})}
    return {"upstreams": {"loop": upstream}, "models": listed, **more}


class Served:
    """A gateway that listens."""

    def __init__(self, opened: Opened, port: int) -> None:
        self.opened = opened
        self.port = port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, path: str, body: Any = None, key: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        connection.request("GET" if data is None else "POST", path, data, sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = "json" in (answer.getheader("content-type") or "")
        return answer.status, json.loads(text) if is_json else text, dict(answer.getheaders())

    def chat(self, model: str, text: str = "one two three", key: str | None = None, **more: Any) -> Any:
        """Status, body and headers of the answer to a chat."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 10, **more}
        return self.ask("/v1/chat/completions", body, key)

    def events(self, model: str, key: str | None = None, **more: Any) -> list[dict[str, Any]]:
        """The events of a chat that is streamed; the end's is left out."""
        status, text, _ = self.chat(model, key=key, stream=True, **more)
        assert status == 200, text
        lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def settled(self) -> None:
        """Wait until nothing is under way and every call is in the ledger."""
        until = time.monotonic() + PATIENCE_S
        while self.opened.gateway.watch.under_way or self.opened.gateway.trier._tasks:
            assert time.monotonic() < until
            time.sleep(0.005)

    def calls(self) -> list[dict[str, Any]]:
        """All calls in the ledger, in order."""
        self.settled()
        with self.opened.books._engine.begin() as connection:
            return [
                dict(row) for row in connection.execute(sa.select(CALLS).order_by(CALLS.c.sent)).mappings()
            ]

    def balance(self, account: str = "anybody") -> tuple[int, int]:
        """What an account has spent and set aside."""
        self.settled()
        with self.opened.books._engine.begin() as connection:
            return balances(connection, [account]).get(account, (0, 0))


@contextmanager
def served(config: dict[str, Any], folder: Path, tracer: Any = None) -> Iterator[Served]:
    """A gateway of a configuration, with its ledger in a folder."""
    found, cards = parse_config({"ledger": f"sqlite:///{folder}/gateway.db", **config}, "the test's", folder)
    opened = open_gateway(found, cards, ENVIRONMENT, tracer)
    listening = bound("127.0.0.1", 0)
    ready = threading.Event()
    app = build_app(opened.gateway, opened.secrets, most_body_bytes=1 << 20)
    rules = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = _Server(rules, ready.set, opened.end)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield Served(opened, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        opened.close()
        listening.close()
        assert not thread.is_alive()
