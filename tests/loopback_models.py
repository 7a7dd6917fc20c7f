"""Models behind a real HTTP server of this machine that answer well, late, half, wrongly, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a model does with its n-th request: a word below, or what it says.
Script = Callable[[int, dict[str, Any]], str]
_STATUSES = {"rate": 429, "quota": 402, "auth": 401, "wrong": 400, "fault": 500}


@dataclass
class Loopback:
    """A server, and what it was asked.

    Attributes:
        scripts: what each model does: ``fault``, ``rate``, ``quota``, ``auth``, ``wrong``, ``stall``,
            ``nonsense``, ``empty``, ``cut:N`` (a stream that ends after N words), ``stuck:N`` (that stops
            there), ``unended:N`` (N words, and no end), or the words to say.
        usage: whether it counts tokens; a function of the model to counts that are wrong.
    """

    scripts: dict[str, Script]
    usage: bool | Callable[[dict[str, Any]], Any] = True
    retry_after: str | None = None
    delay_s: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def of(self, model: str) -> list[dict[str, Any]]:
        """What a model was asked."""
        return [body for body in self.asked if body["model"] == model]


@contextmanager
def loopback(usage: Any = True, **scripts: Script | str) -> Iterator[Loopback]:
    """A server of models that each follow a script, or always say the same."""

    def fixed(words: str) -> Script:
        return lambda number, body: words

    found = Loopback({name: one if callable(one) else fixed(one) for name, one in scripts.items()}, usage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    server.daemon_threads = True
    # Clients that go away in the middle are what some tests are about.
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        server.shutdown()
        server.server_close()


def _handler(state: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.of(body["model"]))
                state.asked.append(body)
                state.headers.append(dict(self.headers))
            if state.delay_s:
                time.sleep(state.delay_s)
            try:
                self._act(state.scripts[body["model"]](number, body), body)
            except OSError:
                state.gone.append(body["model"])
                self.close_connection = True

        def _act(self, does: str, body: dict[str, Any]) -> None:
            if does in _STATUSES:
                words = {
                    "error": {"message": f"{does}, and the key is sk-secret" if does == "auth" else does}
                }
                self._send(json.dumps(words), _STATUSES[does])
            elif does == "stall":
                state.over.wait(30)
                self.close_connection = True
            elif does == "nonsense":
                self._send("<html>nothing of JSON</html>")
            elif does == "empty":
                self._send(json.dumps({"object": "chat.completion", "choices": []}))
            elif body.get("stream"):
                self._stream(does, body)
            elif does.startswith(("cut", "stuck", "unended")):
                self._cut_whole()
            else:
                self._send(json.dumps(_whole(does, body, state.usage)))

        def _cut_whole(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True

        def _send(self, text: str, status: int = 200) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if state.retry_after is not None and status == 429:
                self.send_header("Retry-After", state.retry_after)
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, does: str, body: dict[str, Any]) -> None:
            kind, _, number = does.partition(":")
            broken = kind if kind in ("cut", "stuck", "unended") else ""
            words = (["word"] * int(number or 3)) if broken else does.split()
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._event(_chunk(body, {"role": "assistant"}))
            for place, word in enumerate(words):
                self._event(_chunk(body, {"content": word if not place else f" {word}"}))
                if not broken and state.delay_s:
                    time.sleep(state.delay_s)
            if broken == "stuck":
                state.over.wait(30)
            if broken in ("cut", "stuck"):
                self.close_connection = True
                return
            if not broken:
                self._event(_chunk(body, {}, "stop"))
                if (body.get("stream_options") or {}).get("include_usage") and state.usage:
                    self._event({**_chunk(body, {}), "choices": [], "usage": _usage(does, body, state.usage)})
            self._raw(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def _event(self, data: dict[str, Any]) -> None:
            self._raw(f"data: {json.dumps(data)}\n\n".encode())

        def _raw(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    return Handler


def _chunk(body: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"],
        "system_fingerprint": "fp_1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }  # fmt: skip


def _usage(words: str, body: dict[str, Any], usage: Any) -> Any:
    """A token a word."""
    if callable(usage):
        return usage(body)
    read = sum(len(str(message["content"]).split()) for message in body.get("messages", []))
    written = len(words.split())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _whole(words: str, body: dict[str, Any], usage: Any) -> dict[str, Any]:
    part = {"message": {"role": "assistant", "content": words}} if "messages" in body else {"text": words}
    found = {
        "id": "chatcmpl-1", "created": 1,
        "object": "chat.completion" if "messages" in body else "text_completion",
        "model": body["model"], "choices": [{"index": 0, "finish_reason": "stop", **part}],
        "system_fingerprint": "fp_1",
    }  # fmt: skip
    return {**found, "usage": _usage(words, body, usage)} if usage else found
