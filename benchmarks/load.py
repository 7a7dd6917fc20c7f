"""Many clients that stream and often go away: whether `mixtura serve` loses, leaks or mixes up anything.

Every answer is compared with what the server gave the same request by itself; memory, threads and open files
of the server's process are noted throughout. Ends with 1 where something is not as it must be.

    python benchmarks/load.py                       # the specimen, 64 clients, 5 minutes
    python benchmarks/load.py MODEL --memory 8GiB --minutes 60
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 600
NUM_PROMPTS = 24
# Memory may grow by so much of itself from the second fifth of the time to the last one.
MOST_GROWTH = 0.02


@dataclass
class Seen:
    """What clients saw, all together."""

    whole: int = 0
    cancelled: int = 0
    refused: int = 0
    tokens: int = 0
    other: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Server:
    """`mixtura serve` as a process of its own."""

    def __init__(self, words: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "mixtura", "serve", *words, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.watched = psutil.Process(self.process.pid)
        end = time.monotonic() + PATIENCE_S
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server did not start")
            time.sleep(0.2)

    def _is_up(self) -> bool:
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, Any]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        return answer.status, body

    def stream(self, body: dict[str, Any], leave_after: int | None = None) -> tuple[int, str, int]:
        """Status, text and number of tokens; the connection is cut after some where that is asked for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                return answer.status, answer.read().decode()[:200], 0
            return 200, *self._read(answer, leave_after)
        finally:
            connection.close()

    @staticmethod
    def _read(answer: http.client.HTTPResponse, leave_after: int | None) -> tuple[str, int]:
        text, num = "", 0
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text += event["choices"][0]["text"]
            num += 1
            if leave_after is not None and num >= leave_after:
                break
        return text, num


def requests_of(seed: int, num_tokens: int) -> list[dict[str, Any]]:
    """Different prompts, some of which begin alike, and answers of different lengths."""
    draw = random.Random(seed)
    made = []
    for number in range(NUM_PROMPTS):
        words = [str(draw.randrange(1000)) for _ in range(draw.randrange(4, 60))]
        begin = "What is the sum of these numbers, one after the other? " if number % 3 == 0 else ""
        most = draw.randrange(num_tokens // 2, num_tokens + 1)
        made.append({"prompt": begin + " ".join(words), "max_tokens": most, "temperature": 0, "stream": True})
    return made


def client(
    server: Server, asked: list[dict[str, Any]], alone: list[str], seen: Seen, end: float, seed: int
) -> None:
    """One client: request after request, of which three in ten are given up."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        place = draw.randrange(len(asked))
        leave = draw.randrange(1, 20) if draw.random() < 0.3 else None
        try:
            status, text, num = server.stream(asked[place], leave)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            with seen.lock:
                seen.failed.append(f"{type(error).__name__}: {error}")
            continue
        with seen.lock:
            seen.tokens += num
            seen.refused += status == 429
            if status not in (200, 429):
                seen.failed.append(f"{status}: {text}")
            elif status == 200 and leave is not None:
                seen.cancelled += 1
                if not alone[place].startswith(text):
                    seen.other.append(f"prompt {place}, given up: {text!r}")
            elif status == 200:
                seen.whole += 1
                if text != alone[place]:
                    seen.other.append(f"prompt {place}: {text!r} in the place of {alone[place]!r}")
        if status == 429:
            time.sleep(1)


def watch(server: Server, end: float) -> list[tuple[float, int, int, int]]:
    """Seconds, resident bytes, threads and open files of the server, until the time is over."""
    start, samples = time.monotonic(), []
    while time.monotonic() < end:
        one = server.watched
        samples.append((time.monotonic() - start, one.memory_info().rss, one.num_threads(), one.num_fds()))
        time.sleep(0.5)
    return samples


def measured(server: Server, asked: list[dict[str, Any]], seconds: float, num_clients: int) -> dict[str, Any]:
    """The load, between two times that every request is asked by itself."""
    alone = [server.stream(one)[1] for one in asked]
    seen = Seen()
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(server, asked, alone, seen, end, seed), daemon=True)
        for seed in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    samples = watch(server, end)
    for thread in threads:
        thread.join(PATIENCE_S)
    stuck = sum(thread.is_alive() for thread in threads)
    idle = settled(server)
    again = [server.stream(one)[1] for one in asked]
    fifth = max(len(samples) // 5, 1)
    early, late = (
        statistics.median(rss for _, rss, _, _ in part)
        for part in (samples[fifth : 2 * fifth], samples[-fifth:])
    )
    return {
        "answers": seen.whole, "given_up": seen.cancelled, "refused_429": seen.refused, "tokens": seen.tokens,
        "tokens_per_second": round(seen.tokens / seconds, 1),
        "failed": len(seen.failed), "failures": seen.failed[:5],
        "other_than_alone": len(seen.other), "others": seen.other[:5],
        "other_than_alone_afterwards": sum(one != two for one, two in zip(alone, again, strict=True)),
        "clients_left_waiting": stuck,
        "resident_mb": {"early": round(early / 1e6, 1), "late": round(late / 1e6, 1),
                        "most": round(max(rss for _, rss, _, _ in samples) / 1e6, 1)},
        "growth": round(late / early - 1, 4),
        "threads": [samples[len(samples) // 2][2], server.watched.num_threads()],
        "open_files_idle": server.watched.num_fds(),
        "after": {name: idle[name] for name in ("running", "waiting", "finished", "memory", "latency")},
    }  # fmt: skip


def settled(server: Server) -> dict[str, Any]:
    """The server's own counts once nothing runs any more."""
    end = time.monotonic() + 30
    while True:
        stats: dict[str, Any] = server.get("/stats")[1]
        if not (stats["running"] or stats["waiting"]) or time.monotonic() > end:
            return stats
        time.sleep(0.1)


def wrong(found: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    counts = ("failed", "other_than_alone", "other_than_alone_afterwards", "clients_left_waiting")
    said = [f"{found[name]} {name}" for name in counts if found[name]]
    after = found["after"]
    said += [f"{after[name]} still {name}" for name in ("running", "waiting") if after[name]]
    if after["memory"]["running"]:
        said.append(f"{after['memory']['running']} bytes still set apart")
    if found["growth"] > MOST_GROWTH:
        said.append(f"memory grew by {found['growth']:.1%}")
    return said


def main() -> None:
    """Start the server, load it, print and keep what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="without it, the specimen")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--memory")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    words = [*([given.model] if given.model else []), "--concurrency", str(given.concurrency)]
    words += ["--queue", str(given.clients), "--context", str(given.context)]
    words += ["--memory", given.memory] if given.memory else []
    server = Server(words)
    try:
        asked = requests_of(given.seed, given.tokens)
        found = measured(server, asked, given.minutes * 60, given.clients)
        server.process.send_signal(signal.SIGTERM)
        found["exit_code"] = server.process.wait(PATIENCE_S)
    finally:
        server.process.kill()
    machine = {"processors": os.cpu_count(), "load": os.getloadavg()[0], "platform": platform.platform()}
    head = {
        "model": Path(given.model).name if given.model else "specimen",
        "clients": given.clients,
        "minutes": given.minutes,
        "seed": given.seed,
        "date": time.strftime("%Y-%m-%d"),
        **machine,
    }
    said = wrong(found) + ([f"exit code {found['exit_code']}"] if found["exit_code"] else [])
    text = json.dumps({**head, **found, "wrong": said}, indent=1)
    sys.stdout.write(text + "\n")
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
