"""Tokens in a second of 1, 4 and 16 clients that stream at once: `mixtura serve` beside other servers.

Every server answers the same requests over the same API: prompts of numbers of different lengths, greedy, as
many new tokens each. The servers' rounds are interleaved; medians over rounds are reported.

    python benchmarks/serve.py MODEL --rounds 5
    python benchmarks/serve.py MODEL --peer "llama-server -m model.gguf -np 16 -c 8192 --port {port}"

``--peer`` is a command that serves the same weights in the same width (``mixtura export MODEL --type bf16``
writes a GGUF file); {port} is put in. llama-server is built from the source distribution of llama-cpp-python.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENTS = (1, 4, 16)
PATIENCE_S = 600


@dataclass
class Round:
    """What the clients of one round saw."""

    tokens: int = 0
    seconds: float = 0.0
    first_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Server:
    """A server as a process of its own."""

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = shlex.split(command.replace("{port}", str(self.port)))
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE_S
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} did not start: {command}")
            time.sleep(0.2)

    def _is_up(self) -> bool:
        try:
            return self._get("/v1/models") == 200
        except OSError:
            return False

    def _get(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status

    def round(self, num_clients: int, num_tokens: int, seed: int) -> Round:
        """So many clients, each with one request."""
        made = Round()
        lock = threading.Lock()
        clients = [
            threading.Thread(target=self._client, args=(made, lock, place, num_tokens, seed))
            for place in range(num_clients)
        ]
        start = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        made.seconds = time.perf_counter() - start
        return made

    def _client(self, made: Round, lock: threading.Lock, place: int, num_tokens: int, seed: int) -> None:
        prompt = " ".join(str((seed * 7919 + place * 104729 + n * 31) % 1000) for n in range(16 + 4 * place))
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        start, first, count = time.perf_counter(), None, 0
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            with lock:
                made.errors.append(answer.read().decode()[:200])
            return
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if any(choice.get("text") for choice in event["choices"]):
                first = first or time.perf_counter()
            # A piece of text may be of several tokens: the server's own count is what is taken.
            count = (event.get("usage") or {}).get("completion_tokens", count)
        with lock:
            made.tokens += count
            made.first_ms.append(((first or start) - start) * 1000)


def summed(rounds: list[Round]) -> dict[str, Any]:
    """Medians over rounds."""
    return {
        "tokens_per_second": round(statistics.median(one.tokens / one.seconds for one in rounds), 2),
        "first_token_ms": round(statistics.median(ms for one in rounds for ms in one.first_ms or [0]), 1),
        "tokens": sum(one.tokens for one in rounds),
        "errors": [error for one in rounds for error in one.errors][:3],
    }


def main() -> None:
    """Start the servers, measure in turns, print and keep what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    ours = f"{shlex.quote(sys.executable)} -m mixtura serve {shlex.quote(str(asked.model))} --port {{port}}"
    servers = [Server("mixtura", f"{ours} --concurrency {max(CLIENTS)} --no-prefix-cache")]
    servers += [Server(Path(shlex.split(command)[0]).name, command) for command in asked.peer]
    try:
        rows = measured(servers, asked.rounds, asked.tokens)
    finally:
        for server in servers:
            server.process.terminate()
    machine = {"processors": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.platform()}
    result = {"model": asked.model.name, "date": time.strftime("%Y-%m-%d"), **machine, "rows": rows}
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if asked.out is not None:
        asked.out.write_text(text + "\n", encoding="utf-8")


def measured(servers: list[Server], num_rounds: int, num_tokens: int) -> list[dict[str, Any]]:
    """Rows of servers and numbers of clients."""
    rows = []
    for num_clients in CLIENTS:
        found: dict[str, list[Round]] = {server.name: [] for server in servers}
        for number in range(num_rounds + 1):
            for server in servers:
                one = server.round(num_clients, num_tokens, number)
                if number:  # the first warms up
                    found[server.name].append(one)
        rows += [{"server": name, "clients": num_clients, **summed(rounds)} for name, rounds in found.items()]
    return rows


if __name__ == "__main__":
    main()
