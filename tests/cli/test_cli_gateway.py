"""`mixtura gateway`: what it refuses, what it checks, and the log that it writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("aiohttp")
pytest.importorskip("limits")

from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.ledger import Hold, Settled

Run = Callable[..., tuple[int, str, str]]
WHOLE = """
upstreams: {local: {address: "http://127.0.0.1:8000/v1"}}
models: {small: {upstream: local}}
ledger: "sqlite:///LEDGER"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(WHOLE.replace("LEDGER", str(tmp_path / "a.db")))
    return path


def test_a_configuration_is_checked(run: Run, config: Path) -> None:
    code, out, err = run("gateway", "--config", config, "--check")
    assert (code, err) == (0, "")
    assert out.endswith("can be served: small\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [("models", "modells"), ("local}", "lokal}"), ("address", "adress"), ("sqlite", "oracle")],
)
def test_a_wrong_one_is_a_sentence(run: Run, config: Path, text: str, said: str) -> None:
    config.write_text(config.read_text().replace(text, said, 1))
    code, out, err = run("gateway", "--config", config, "--check")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")


def test_what_was_decided_is_written_as_a_table(run: Run, config: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert "no prompts that a router chose for" in run("gateway", "--config", config, "--log", log)[2]
    engine = ledger.connect(f"sqlite:///{tmp_path}/a.db")
    row = {
        "request": "r",
        "account": "a",
        "asked": "auto",
        "model": "small",
        "how": "router",
        "propensity": 0.9,
    }
    more = {"scores": "{}", "labels": json.dumps({"task": "sum"}), "prompt": "1 + 1?", "at": time.time()}
    hold = Hold(
        id="1", account="a", amount=9, owner="x", request="r", asked="auto", model="small", sent=time.time()
    )
    with engine.begin() as connection:
        ledger.open_account(connection, "a")
        ledger.decide(connection, row | more)
        ledger.reserve(connection, hold, None)
        ledger.settle(connection, "1", Settled(outcome="ok", cost=5), None)
        assert ledger.judge(connection, "r", "a", 0.5)
    engine.dispose()
    code, out, _ = run("gateway", "--config", config, "--log", log)
    assert (code, out.startswith("1 prompts in")) == (0, True)
    expected = {
        "id": "r",
        "prompt": "1 + 1?",
        "model": "small",
        "score": 0.5,
        "task": "sum",
        "propensity": 0.9,
        "cost": 5e-12,
    }
    assert json.loads(log.read_text()) == expected
    assert run("gateway", "--config", config, "--log", log)[0] == 2
