"""What the gateway adds to an answer, beside LiteLLM's proxy; and whether budgets hold under load and faults.

    python benchmarks/gateway.py --litellm ~/litellm/bin/litellm      # a virtual environment of its own
    python benchmarks/gateway.py --load 300                           # 64 clients for five minutes

Overhead: an upstream of this machine answers after 20 ms. The same request goes to it directly, through
`mixtura gateway` and through LiteLLM's proxy, in turns of some requests, so that whatever else the machine
does meets all three; the overhead is what a percentile is above the direct one. mixtura's requests have a key
with a budget and are written to a ledger before and after; LiteLLM's have neither key nor database.

Load: upstreams that stall, break off, answer 429 or nonsense at random, clients that go away, two keys whose
budgets run out. Afterwards the ledger is compared with what the upstreams saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

MESSAGES = [{"role": "user", "content": "What is the capital of Peru, and why?"}]
WORDS = ["Lima", "is", "the", "capital", "of", "Peru", "because", "it", "always", "was"]
PICO = 10**12
DELAY_S = 0.02


def upstream(seed: int) -> None:
    """A server of models: `steady` answers well, the others as chance has it."""
    draw, seen = random.Random(seed), Counter[str]()

    async def answer(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        seen[body["model"]] += 1
        await asyncio.sleep(DELAY_S)
        fate = (
            "well"
            if body["model"] == "steady"
            else draw.choice(["well"] * 6 + ["stall", "cut", "rate", "nonsense", "fault"])
        )
        if fate == "stall":
            await asyncio.sleep(30)
        if fate in ("rate", "fault"):
            return web.json_response({"error": {"message": fate}}, status=429 if fate == "rate" else 500)
        if fate == "nonsense":
            return web.Response(text="<html>")
        head = {"id": "c", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 9, "completion_tokens": len(WORDS), "total_tokens": 9 + len(WORDS)}
        if not body.get("stream"):
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": " ".join(WORDS)},
            }
            if fate == "cut":
                return web.Response(text='{"choices": [')
            return web.json_response(
                {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            )
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for place, word in enumerate(WORDS):
            if fate == "cut" and place == 4:
                request.transport.abort()  # type: ignore[union-attr]
                return stream
            delta = {"index": 0, "delta": {"content": word + " "}, "finish_reason": None}
            await stream.write(f"data: {json.dumps({**head, 'choices': [delta]})}\n\n".encode())
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        for part in ({**head, "choices": [end]}, {**head, "choices": [], "usage": usage}):
            await stream.write(f"data: {json.dumps(part)}\n\n".encode())
        await stream.write(b"data: [DONE]\n\n")
        return stream

    async def counts(request: web.Request) -> web.Response:
        return web.json_response(seen)

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", answer), web.get("/seen", counts)])

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print("serving at", runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


def started(stack: ExitStack, *command: str, until: str = "serving") -> str:
    """What a server says when it is ready; it ends with the stack."""
    process = stack.enter_context(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if until in line:
            return line
    raise SystemExit(f"{command[0]} did not start: {''.join(said[-5:])}")


def gateway(stack: ExitStack, folder: Path, address: str, keys: dict[str, Any], **more: Any) -> str:
    """The address of a gateway of some models."""
    card = {"upstream": "loop", "input_price": 1.0, "output_price": 2.0, "context": 4096}
    config = {
        "ledger": f"sqlite:///{folder}/gateway.db",
        "upstreams": {"loop": {"address": address, "stall_s": 2.0}},
        "models": {"steady": card, "shaky": {**card, "fallbacks": ["shakier"]}, "shakier": card},
        "keys": keys, **more,
    }  # fmt: skip
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(config))
    line = started(stack, sys.executable, "-m", "mixtura", "gateway", "--config", str(path), "--port", "0")
    return line.partition(" at ")[2].split(",")[0].split(";")[0].strip()


def litellm(stack: ExitStack, folder: Path, command: str, address: str) -> str:
    """The address of LiteLLM's proxy before the same upstream."""
    config = {
        "model_list": [
            {
                "model_name": "steady",
                "litellm_params": {"model": "openai/steady", "api_base": address, "api_key": "x"},
            }
        ],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    path = folder / "litellm.yaml"
    path.write_text(yaml.safe_dump(config))
    port = "8471"
    process = stack.enter_context(
        subprocess.Popen(
            [command, "--config", str(path), "--port", port, "--host", "127.0.0.1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )
    )  # fmt: skip
    stack.callback(process.kill)
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).read()
        except OSError:
            time.sleep(0.5)
        else:
            return f"http://127.0.0.1:{port}/v1"
    raise SystemExit("LiteLLM's proxy did not start")


async def timed(session: aiohttp.ClientSession, address: str, number: int, at_once: int) -> list[float]:
    """Seconds of so many requests, some of them at once."""
    taken: list[float] = []
    left = iter(range(number))

    async def client() -> None:
        for _ in left:
            begun = time.perf_counter()
            body = {"model": "steady", "messages": MESSAGES, "max_tokens": 32}
            async with session.post(f"{address}/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                await response.read()
            taken.append(time.perf_counter() - begun)

    await asyncio.gather(*[client() for _ in range(at_once)])
    return taken


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1000


async def overheads(addresses: dict[str, str], at_once: int, turns: int, each: int) -> dict[str, Any]:
    """Percentiles of each address, asked in turns."""
    found: dict[str, list[float]] = {name: [] for name in addresses}
    headers = {"Authorization": "Bearer bench"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        for address in addresses.values():
            await timed(session, address, each, at_once)
        for _ in range(turns):
            for name, address in addresses.items():
                found[name] += await timed(session, address, each, at_once)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    whole = {
        name: {key: percentile(values, one) for key, one in shares.items()} for name, values in found.items()
    }
    over = {
        name: {key: one[key] - whole["direct"][key] for key in shares}
        for name, one in whole.items()
        if name != "direct"
    }
    return {"at_once": at_once, "requests": turns * each, "ms": whole, "overhead_ms": over}


async def load(address: str, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """What became of requests of many clients."""
    until, ended = time.monotonic() + seconds, Counter[str]()

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() < until:
            stream, leaves = draw.random() < 0.5, draw.random() < 0.1
            body = {"model": "shaky", "messages": MESSAGES, "max_tokens": 32, "stream": stream}
            headers = {"Authorization": f"Bearer {draw.choice(['small', 'large'])}"}
            timeout = aiohttp.ClientTimeout(total=draw.uniform(0.01, 0.1) if leaves else 120)
            try:
                async with session.post(
                    f"{address}/chat/completions", json=body, headers=headers, timeout=timeout
                ) as one:
                    text = await one.text()
                    broke = one.status == 200 and stream and "[DONE]" not in text
                    ended["broke off" if broke else str(one.status)] += 1
                    if one.status == 402:
                        await asyncio.sleep(0.05)
            except TimeoutError:
                ended["left" if leaves else "lost"] += 1
            except aiohttp.ClientError as error:
                ended[f"lost: {type(error).__name__}"] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*[client(number, session) for number in range(clients)])
    return dict(ended)


def audited(folder: Path, seen: dict[str, int], budgets: dict[str, float]) -> dict[str, Any]:
    """The ledger beside the upstreams' own count."""
    ledger = sqlite3.connect(folder / "gateway.db")
    accounts = {
        name: (spent, held)
        for name, spent, held in ledger.execute("select name, spent, reserved from accounts")
    }
    charged = dict(ledger.execute("select account, sum(cost) from calls group by account"))
    (calls,) = ledger.execute("select count(*) from calls where outcome not in ('down')").fetchone()
    by_outcome = dict(ledger.execute("select outcome, count(*) from calls group by outcome"))
    ledger.close()
    for name, (spent, held) in accounts.items():
        assert held == 0, f"{held} stay held for {name}"
        assert spent == charged[name], f"{name}: spent {spent}, its calls {charged[name]}"
        assert spent <= round(budgets[name] * PICO), f"{name} has spent {spent}"
    return {
        "calls": calls, "seen_by_upstreams": sum(seen.values()), "outcomes": by_outcome,
        "spent_usd": {name: spent / PICO for name, (spent, _) in accounts.items()}, "budgets_usd": budgets,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--litellm", help="LiteLLM's command")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--each", type=int, default=100)
    parser.add_argument("--load", type=float, help="seconds of load in place of overheads")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--about", default="", help="what else the machine did")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/gateway.json"))
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.upstream:
        upstream(given.seed)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        line = started(stack, sys.executable, __file__, "--upstream", "--seed", str(given.seed))
        root = f"http://127.0.0.1:{line.split()[-1]}"
        if given.load is None:
            found = {"overhead": measured(stack, folder, f"{root}/v1", given)}
        else:
            found = {"load": loaded(stack, folder, root, given)}
    before = json.loads(given.result.read_text()) if given.result.exists() else {}
    made = {
        "seed": given.seed, "date": datetime.now(UTC).date().isoformat(), "about": given.about,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fastapi", "uvicorn", "aiohttp", "sqlalchemy")},
    }  # fmt: skip
    (key,) = found
    given.result.write_text(json.dumps({**before, key: {**made, **found[key]}}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measured(stack: ExitStack, folder: Path, address: str, given: argparse.Namespace) -> dict[str, Any]:
    """Overheads at several numbers of clients."""
    os.environ["BENCH_KEY"] = "bench"
    addresses = {"direct": address}
    addresses["mixtura"] = gateway(stack, folder, address, {"bench": {"secret": "BENCH_KEY", "budget": 1000}})
    more: dict[str, Any] = {}
    if given.litellm:
        addresses["litellm"] = litellm(stack, folder, given.litellm, address)
        python = str(Path(given.litellm).with_name("python"))
        code = "import importlib.metadata as m; print(m.version('litellm'))"
        more["litellm"] = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    rows = [asyncio.run(overheads(addresses, n, given.turns, given.each)) for n in (1, 16, given.clients)]
    return {**more, "upstream_ms": DELAY_S * 1000, "rows": rows}


def loaded(stack: ExitStack, folder: Path, root: str, given: argparse.Namespace) -> dict[str, Any]:
    """A load, and the ledger after it."""
    os.environ |= {"SMALL_KEY": "small", "LARGE_KEY": "large"}
    # The first runs out early, the second about halfway: a call is some 30 millionths of a dollar.
    budgets = {"small": 0.002, "large": given.load * 0.002}
    keys = {name: {"secret": f"{name.upper()}_KEY", "budget": budget} for name, budget in budgets.items()}
    address = gateway(stack, folder, f"{root}/v1", keys, resting={"failures": 100_000})
    ended = asyncio.run(load(address, given.clients, given.load, given.seed))
    time.sleep(5)

    async def seen() -> dict[str, int]:
        async with aiohttp.ClientSession() as session, session.get(f"{root}/seen") as response:
            return dict(await response.json())

    return {
        "seconds": given.load,
        "clients": given.clients,
        "requests": ended,
        **audited(folder, asyncio.run(seen()), budgets),
    }


if __name__ == "__main__":
    main()
