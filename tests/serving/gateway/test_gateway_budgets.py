"""Budgets hold to the last pico-dollar: many requests at once, processes that are killed, and two of them."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("aiohttp")
pytest.importorskip("limits")

import sqlalchemy as sa
import yaml
from command_server import ENVIRONMENT as COMMAND
from gateway_helpers import ENVIRONMENT, PATIENCE_S, TOKEN, configured, served
from loopback_models import loopback

from mixtura.errors import UserError
from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.ledger import CALLS, HOLDS, Hold, Settled
from mixtura.types.models import PICO_PER_DOLLAR

FAULTS = ("fault", "rate", "nonsense", "cut:1", "empty")


def keys(budget: float, **more: Any) -> dict[str, Any]:
    return {"alice": {"secret": "KEY_ALICE", "budget": budget, **more}}


def test_many_at_once_never_pass_the_budget_and_nothing_is_lost(tmp_path: Path) -> None:
    draw = random.Random(0)

    def script(number: int, body: dict[str, Any]) -> str:
        return draw.choice((*FAULTS, *["a b c d e"] * 5))

    def usage(body: dict[str, Any]) -> Any:
        # Most are right; some are nonsense, and some more than was ever held.
        counts = {"prompt_tokens": 3, "completion_tokens": 5}
        return draw.choice([counts] * 6 + [None, {"prompt_tokens": "x"}, {"prompt_tokens": 9000}])

    budget = 0.05
    with loopback(usage, small=script, large=script) as models:
        config = configured(
            models.address, "small", "large", keys=keys(budget), cards={"small": {"fallbacks": ["large"]}},
            resting={"failures": 1000},
        )  # fmt: skip
        with served(config, tmp_path) as gateway:

            def ask(number: int) -> int:
                return gateway.chat("small", key="alice", stream=bool(number % 2))[0]

            with ThreadPoolExecutor(16) as pool:
                statuses = list(pool.map(ask, range(150)))
            spent, held = gateway.balance("alice")
            calls = gateway.calls()
    assert held == 0
    assert spent <= budget * PICO_PER_DOLLAR
    assert spent == sum(one["cost"] for one in calls)
    assert {200, 402} <= set(statuses) <= {200, 402, 429, 502}
    # Every call that reached an upstream is one line of the ledger.
    assert len(calls) == len(models.asked)
    assert any(one["overrun"] for one in calls)
    assert any(one["estimated"] for one in calls)


def test_what_does_not_fit_goes_to_a_model_that_does(tmp_path: Path) -> None:
    with loopback(small="a", large="a") as models:
        config = configured(
            models.address, "small", "large",
            keys={"alice": {"secret": "KEY_ALICE", "budget": 0.01}},
            cards={"large": {"output_price": 9000.0, "fallbacks": ["small"]}},
        )  # fmt: skip
        with served(config, tmp_path) as gateway:
            assert gateway.chat("large", key="alice")[2]["x-mixtura-model"] == "small"
            status, body, _ = gateway.chat("small", key="alice", max_tokens=2000)
    assert models.of("large") == []
    assert status == 402
    assert "smaller max_tokens" in body["error"]["message"]
    assert body["error"]["code"] == "insufficient_quota"


def test_each_answer_and_prompt_is_held_for(tmp_path: Path) -> None:
    with loopback(small="a") as models:
        config = configured(models.address, "small", keys=keys(1000 * 1e-5))
        with served(config, tmp_path) as gateway:
            assert gateway.chat("small", key="alice", max_tokens=300)[0] == 200
            assert gateway.chat("small", key="alice", max_tokens=300, n=4)[0] == 402
            several = {"model": "small", "prompt": ["a"] * 4, "max_tokens": 300}
            assert gateway.ask("/v1/completions", several, key="alice")[0] == 402
            many = {"model": "small", "prompt": "a", "max_tokens": 300, "best_of": 4}
            assert gateway.ask("/v1/completions", many, key="alice")[0] == 402
            picture = [{"type": "image_url", "image_url": {"url": "http://localhost/a"}}]
            status, body, _ = gateway.chat("small", picture, key="alice")  # type: ignore[arg-type]
    assert (status, "images" in body["error"]["message"]) == (402, True)


def test_a_budget_begins_anew_each_month(tmp_path: Path) -> None:
    month = time.strftime("%Y-%m", time.gmtime())
    with loopback(small="a") as models:
        config = configured(models.address, "small", keys=keys(1.0, per="month"))
        with served(config, tmp_path) as gateway:
            gateway.chat("small", key="alice")
            assert gateway.balance(f"alice@{month}") == (4 * TOKEN, 0)


def test_rates_of_keys(tmp_path: Path) -> None:
    with loopback(small="a") as models:
        config = configured(models.address, "small")
        config["keys"] = {
            "alice": {"secret": "KEY_ALICE", "requests_per_minute": 2},
            "bob": {"secret": "KEY_BOB", "tokens_per_minute": 60, "models": ["small"]},
        }
        with served(config, tmp_path) as gateway:
            answers = [gateway.chat("small", key="alice") for _ in range(3)]
            tokens = [gateway.chat("small", key="bob")[0] for _ in range(3)]
            too_many = gateway.chat("small", key="bob", max_tokens=100)
    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert 1 <= int(answers[2][2]["retry-after"]) <= 60
    assert tokens == [200, 429, 429]
    assert (too_many[0], "smaller max_tokens" in too_many[1]["error"]["message"]) == (400, True)


def _hold(engine: sa.Engine, which: str, amount: int, budget: int | None, owner: str = "me") -> bool:
    hold = Hold(
        id=which, account="a", amount=amount, owner=owner, request="r", asked="m", model="m", sent=1.0
    )
    with engine.begin() as connection:
        ledger.open_account(connection, "a")
        return ledger.reserve(connection, hold, budget)


def _settle(engine: sa.Engine, which: str, cost: int, budget: int | None) -> int:
    with engine.begin() as connection:
        return ledger.settle(connection, which, Settled(outcome="ok", cost=cost), budget)


def _balance(engine: sa.Engine) -> tuple[int, int]:
    with engine.begin() as connection:
        return ledger.balances(connection, ["a"])["a"]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        made = ledger.connect(f"sqlite:///{tmp_path}/a.db")
    else:
        made = ledger.connect(request.getfixturevalue("postgres"))
        with made.begin() as connection:
            for table in (HOLDS, CALLS, ledger.ACCOUNTS, ledger.OWNERS):
                connection.execute(sa.delete(table))
    yield made
    made.dispose()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of this test's own, on a socket in a folder; it refuses to be run by root."""
    pytest.importorskip("psycopg")
    found = shutil.which("initdb") or next(iter(glob("/usr/lib/postgresql/*/bin/initdb")), None)
    if found is None:
        pytest.skip("needs PostgreSQL")
    who: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    with TemporaryDirectory() as folder:
        if who:
            shutil.chown(folder, "nobody")
        data = Path(folder, "data")
        subprocess.run([found, "-D", data, "-U", "me", "-A", "trust"], check=True, capture_output=True, **who)
        server = Path(found).resolve().with_name("postgres")
        process = subprocess.Popen(
            [server, "-D", data, "-k", folder, "-h", ""], stderr=subprocess.DEVNULL, cwd=folder, **who
        )
        url = f"postgresql://me@/postgres?host={folder}"
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                ledger.connect(url).dispose()
                break
            except UserError:
                assert time.monotonic() < until
                time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)


def test_holds_and_settling(engine: sa.Engine) -> None:
    assert _hold(engine, "1", 60, 100)
    assert not _hold(engine, "2", 41, 100)
    assert _hold(engine, "3", 40, 100)
    assert _balance(engine) == (0, 100)
    assert _settle(engine, "1", 10, 100) == 10
    # Once more changes nothing, whatever it says.
    assert _settle(engine, "1", 50, 100) == 10
    assert _balance(engine) == (10, 40)
    # More than was held is charged as far as the budget goes.
    assert _settle(engine, "3", 1000, 100) == 90
    assert _balance(engine) == (100, 0)
    assert not _hold(engine, "4", 1, 100)
    assert _hold(engine, "5", 0, 100)
    with engine.begin() as connection:
        rows = connection.execute(
            sa.select(CALLS.c.id, CALLS.c.cost, CALLS.c.overrun).order_by(CALLS.c.id)
        ).all()
    assert [tuple(row) for row in rows] == [("1", 10, 0), ("3", 90, 910)]


@pytest.mark.parametrize("charge", [True, False])
def test_what_a_killed_process_held(engine: sa.Engine, charge: bool) -> None:
    with engine.begin() as connection:
        ledger.beat(connection, "dead")
        ledger.beat(connection, "alive")
    assert _hold(engine, "1", 30, 100, "dead")
    assert _hold(engine, "2", 20, 100, "alive")
    with engine.begin() as connection:
        assert ledger.recover(connection, charge=charge) == 0
        connection.execute(sa.update(ledger.OWNERS).where(ledger.OWNERS.c.name == "dead").values(beat=0.0))
        assert ledger.recover(connection, charge=charge) == 1
        assert ledger.recover(connection, charge=charge) == 0
    assert _balance(engine) == (30 if charge else 0, 20)
    # It only slept, and now says what it was.
    assert _settle(engine, "1", 7, 100) == 7
    assert _balance(engine) == (7, 20)


WORKER = """
import random, sys, uuid
from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.ledger import Hold, Settled
engine = ledger.connect(sys.argv[1]); draw = random.Random(int(sys.argv[2])); taken = 0
with engine.begin() as c: ledger.open_account(c, "a")
for _ in range(150):
    names = dict(account="a", owner="x", request="r", asked="m", model="m", sent=1.0)
    hold = Hold(id=uuid.uuid4().hex, amount=draw.randint(1, 50), **names)
    with engine.begin() as c: got = ledger.reserve(c, hold, 3000)
    if got:
        call = Settled(outcome="ok", cost=draw.randint(0, 60))
        with engine.begin() as c: taken += ledger.settle(c, hold.id, call, 3000)
print(taken)
"""


def test_two_processes_on_one_ledger(engine: sa.Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, url, str(n)], stdout=subprocess.PIPE, text=True)
        for n in (1, 2)
    ]
    taken = sum(int(process.communicate(timeout=PATIENCE_S)[0]) for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert _balance(engine) == (taken, 0)
    assert 2900 < taken <= 3000


def _start(config: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "mixtura", "gateway", "--config", config, "--port", "0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **COMMAND, **ENVIRONMENT}, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("serving small at http://127.0.0.1:"), said
    return process, int(said.partition("127.0.0.1:")[2].partition("/")[0])


@pytest.mark.slow
def test_killed_and_started_again_the_ledger_is_kept(tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    with loopback(small=lambda number, body: "a b" if number < 5 else "stall") as models:
        given = configured(
            models.address, "small", keys=keys(1.0, admin=True), ledger=f"sqlite:///{tmp_path}/a.db"
        )
        given["upstreams"]["loop"]["stall_s"] = 60
        config.write_text(yaml.safe_dump(given))
        process, port = _start(config, tmp_path)
        body = {"model": "small", "messages": [{"role": "user", "content": "x y z"}], "max_tokens": 10}
        headers = {"Authorization": "Bearer alice", "Content-Type": "application/json"}
        clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S) for _ in range(7)]
        for client in clients[:5]:
            client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            assert client.getresponse().status == 200
        for client in clients[5:]:
            client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        until = time.monotonic() + PATIENCE_S
        while len(models.asked) < 7:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
        process.wait()
        engine = ledger.connect(f"sqlite:///{tmp_path}/a.db")
        with engine.begin() as connection:
            spent, held = ledger.balances(connection, ["alice"])["alice"]
            # As if a minute had gone by.
            connection.execute(sa.update(ledger.OWNERS).values(beat=0.0))
        assert spent == 5 * 5 * TOKEN
        assert held > 0
        process, port = _start(config, tmp_path)
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        client.request("GET", "/stats", headers=headers)
        stats = json.loads(client.getresponse().read())
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        # What came of two calls nobody knows; they are charged in full, so that the budget holds for certain.
        assert (stats["keys"][0]["spent"], stats["keys"][0]["reserved"]) == (spent + held, 0)
        with engine.begin() as connection:
            outcomes = [row.outcome for row in connection.execute(sa.select(CALLS).order_by(CALLS.c.sent))]
        engine.dispose()
    assert outcomes == ["ok"] * 5 + ["lost"] * 2
