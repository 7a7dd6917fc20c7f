"""A real server in a thread of this process, and what it is asked over HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

from serving_helpers import PATIENCE_S

from mixtura.serving.addresses import bound
from mixtura.serving.api.app import build_app
from mixtura.serving.api.service import Service, Settings
from mixtura.serving.listening import serve_until_told
from mixtura.serving.opening import Serving, open_model
from mixtura.serving.watching import Watch

QUESTION = "What is 17 + 28?"
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 60,
}
LARGE = 1 << 16


class Server:
    """A server in a thread of this process, and what it answers."""

    def __init__(self, path: Path, keys: tuple[str, ...] = (), context: int = 256, **serving: Any) -> None:
        self.opened = open_model(path, Serving(context=context, running=4, waiting=8, **serving))
        chosen = tuple(serving.get("adapters", ()))
        settings = Settings(
            name="tiny", adapters=chosen, decoder=serving.get("decoder"), default_tokens=16,
            most_body_bytes=LARGE,
        )  # fmt: skip
        service = Service(self.opened.engine, self.opened.tokenizer, settings)
        watch = Watch(self.opened.engine, "tiny", self.opened.loads)
        self.listening = bound("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        ready = threading.Event()
        app = build_app(service, watch, keys=keys)
        thread = threading.Thread(
            target=serve_until_told, args=(app, self.listening, 1, ready.set), daemon=True
        )
        thread.start()
        assert ready.wait(PATIENCE_S)

    def ask(
        self, path: str, body: Any = None, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = "json" in (answer.getheader("content-type") or "")
        return answer.status, json.loads(text) if is_json else text, dict(answer.getheaders())

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        status, text, _ = self.ask(path, {**body, "stream": True})
        assert status == 200, text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def post_of(body: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    text = json.dumps(body)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(text)}", "", text]).encode()


def wait_for(what: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)
