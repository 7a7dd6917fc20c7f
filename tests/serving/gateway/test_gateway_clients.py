"""LangChain's client against a real gateway: chats, streams, batches, refusals, and what the ledger says.

It brings packages of its own, so it may live in another environment, which MIXTURA_CLIENTS names as for the
tests of the server; it is asked in a process of its own, and skipped where it is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("aiohttp")
pytest.importorskip("limits")

from gateway_helpers import PATIENCE_S, TOKEN, configured, served
from loopback_models import loopback

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("MIXTURA_CLIENTS", sys.executable)
SCRIPT = """
import json, sys
import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

common = {"base_url": sys.argv[1], "api_key": "alice", "max_retries": 0}
chat = ChatOpenAI(model="small", **common)
messages = [SystemMessage("be brief"), HumanMessage("x")]
whole = chat.invoke(messages)

def refusal(run):
    try:
        run()
    except openai.APIError as error:
        return type(error).__name__ + ": " + str(error)

print("said:" + json.dumps({
    "whole": whole.content,
    "used": whole.usage_metadata,
    "parts": "".join(part.content for part in chat.stream(messages)),
    "batch": [one.content for one in chat.batch(["x", "y z"])],
    "text": OpenAI(model="small", **common).invoke("x"),
    "voted": ChatOpenAI(model="both", **common).invoke("x").content,
    "misnamed": refusal(lambda: ChatOpenAI(model="smal", **common).invoke("x")),
    "cut": refusal(lambda: list(ChatOpenAI(model="cut", **common).stream("x"))),
    "stranger": refusal(lambda: ChatOpenAI(model="small", **{**common, "api_key": "no"}).invoke("x")),
}))
"""


def said_by_langchain(address: str) -> dict[str, Any]:
    probe = [PYTHON, "-c", "import langchain_openai"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("langchain_openai is not installed")
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, address],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert found, done.stderr[-3000:]
    made: dict[str, Any] = json.loads(found[-1].removeprefix("said:"))
    return made


def test_langchain(tmp_path: Path) -> None:
    with loopback(small="a b c", large="a b c", cut="cut:2") as models:
        config = configured(models.address, "small", "large", "cut")
        config["policies"] = {"both": {"aggregator": "vote", "models": ["small", "large"]}}
        config["keys"] = {"alice": {"secret": "KEY_ALICE", "budget": 1.0}}
        with served(config, tmp_path) as gateway:
            found = said_by_langchain(gateway.address)
            spent, held = gateway.balance("alice")
    assert found["whole"] == found["parts"] == found["text"] == found["voted"] == "a b c"
    assert found["batch"] == ["a b c", "a b c"]
    used = found["used"]
    assert (used["input_tokens"], used["output_tokens"], used["total_tokens"]) == (3, 3, 6)
    assert "did you mean 'small'" in found["misnamed"]
    assert "broke off" in found["cut"]
    assert "401" in found["stranger"]
    # Whole and streamed: 3 tokens read and 3 written each; then 1 and 2 read.
    assert spent >= (6 + 6 + 4 + 5) * TOKEN
    assert held == 0
    assert len(models.of("large")) == 1
