"""A real gateway before real upstreams: what clients are told, and what the ledger says of it."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("aiohttp")
pytest.importorskip("limits")

from gateway_helpers import PATIENCE_S, TOKEN, configured, served
from loopback_models import loopback

from mixtura.serving.gateway.config import Resting
from mixtura.serving.gateway.resting import Rests
from mixtura.types.asking import Outcome


def test_an_answer_passes_through_and_is_billed_by_the_upstreams_count(tmp_path: Path) -> None:
    with (
        loopback(small="four words of answer") as models,
        served(configured(models.address, "small"), tmp_path) as gateway,
    ):
        status, body, headers = gateway.chat("small", logit_bias={"5": 1}, strange={"a": [1]})
        (call,) = gateway.calls()
        assert gateway.balance() == (7 * TOKEN, 0)
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "four words of answer"
    # What no gateway knows comes through, both ways.
    assert body["system_fingerprint"] == "fp_1"
    assert models.asked[0]["strange"] == {"a": [1]}
    assert models.asked[0]["max_tokens"] == 10
    assert (call["input_tokens"], call["output_tokens"], call["cost"]) == (3, 4, 7 * TOKEN)
    assert (call["outcome"], call["estimated"], call["overrun"]) == ("ok", False, 0)
    assert headers["x-mixtura-model"] == "small"
    assert headers["x-mixtura-request"] == call["request"]
    assert headers["x-mixtura-cost-usd"] == "0.000070000000"


def test_a_stream_passes_through_frame_by_frame(tmp_path: Path) -> None:
    with loopback(small="a b c") as models, served(configured(models.address, "small"), tmp_path) as gateway:
        events = gateway.events("small")
        with_usage = gateway.events("small", stream_options={"include_usage": True})
        calls = gateway.calls()
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in events)
    assert text == "a b c"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    # Asked for in any case, shown where the client wants it.
    assert all("usage" not in one for one in events)
    assert with_usage[-1]["usage"]["completion_tokens"] == 3
    assert all(one["stream_options"] == {"include_usage": True} for one in models.asked)
    assert [(one["cost"], one["estimated"]) for one in calls] == [(6 * TOKEN, False)] * 2


def test_completions_are_answered_too(tmp_path: Path) -> None:
    with (
        loopback(small="and so on") as models,
        served(configured(models.address, "small"), tmp_path) as gateway,
    ):
        status, body, _ = gateway.ask("/v1/completions", {"model": "small", "prompt": "Once"})
        assert gateway.balance()[1] == 0
    assert status == 200
    assert body["choices"][0]["text"] == "and so on"
    # Money is held for so many tokens, so no more may come.
    assert models.asked[0]["max_tokens"] == 4096


@pytest.mark.parametrize(
    ("fault", "outcome", "is_billed"),
    [
        ("fault", "broken", False), ("rate", "rate", False), ("quota", "quota", False),
        ("auth", "auth", False), ("wrong", "refused", False), ("nonsense", "broken", True),
        ("empty", "broken", True),
        ("stall", "timeout", True), ("cut:2", "broken", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_content_is_a_fallback(
    tmp_path: Path, fault: str, outcome: str, is_billed: bool, stream: bool
) -> None:
    if stream and fault.startswith("cut"):
        fault = "cut:0"
    with loopback(small=fault, large="well") as models:
        # A refused key or account rests all models of the address, the fallback among them.
        more: dict[str, Any] = {"cards": {"small": {"fallbacks": ["large"]}}, "upstream": {"stall_s": 0.2}}
        more["resting"] = {"rest_s": 0.2}
        with served(configured(models.address, "small", "large", **more), tmp_path) as gateway:
            if stream:
                events = gateway.events("small")
                assert events[1]["choices"][0]["delta"]["content"] == "well"
            else:
                status, body, headers = gateway.chat("small")
                assert (status, headers["x-mixtura-model"], headers["x-mixtura-attempts"]) == (
                    200,
                    "large",
                    "2",
                )
                assert body["choices"][0]["message"]["content"] == "well"
            first, second = gateway.calls()
            spent, held = gateway.balance()
    assert (first["outcome"], second["outcome"]) == (outcome, "ok")
    assert (first["cost"] > 0, first["estimated"]) == (is_billed, is_billed)
    assert first["request"] == second["request"]
    assert (spent, held) == (first["cost"] + second["cost"], 0)


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("fault", 502, "small gave no usable answer"), ("auth", 502, "small refuses the gateway's key"),
        ("rate", 429, "small takes no more requests"), ("wrong", 400, "small refused the request: wrong"),
        ("stall", 504, "small did not answer in time"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_where_all_fail_the_status_says_so(
    tmp_path: Path, fault: str, status: int, said: str, stream: bool
) -> None:
    with loopback(small=fault) as models:
        config = configured(models.address, "small", attempts=2, upstream={"stall_s": 0.2})
        with served(config, tmp_path) as gateway:
            got, body, _ = gateway.chat("small", stream=stream)
    assert got == status
    assert said in body["error"]["message"]
    assert "sk-secret" not in json.dumps(body)
    # What cannot be better in a moment is not asked again.
    assert len(models.asked) == (1 if fault in ("auth", "wrong") else 2)


@pytest.mark.parametrize(
    ("fault", "outcome"), [("cut:2", "broken"), ("stuck:2", "timeout"), ("unended:2", "broken")]
)
def test_a_stream_that_breaks_off_says_so_and_is_not_begun_again(
    tmp_path: Path, fault: str, outcome: str
) -> None:
    with loopback(small=fault, large="well") as models:
        more: dict[str, Any] = {"cards": {"small": {"fallbacks": ["large"]}}, "upstream": {"stall_s": 0.2}}
        with served(configured(models.address, "small", "large", **more), tmp_path) as gateway:
            status, text, _ = gateway.chat("small", stream=True)
            (call,) = gateway.calls()
            assert gateway.balance() == (call["cost"], 0)
    assert status == 200
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert "[DONE]" not in text
    assert [one["choices"][0]["finish_reason"] for one in events] == [None, None, None, "error"]
    assert events[-1]["error"]["message"] == f"the answer of small broke off ({outcome})"
    assert (call["outcome"], call["estimated"], call["output_tokens"]) == (outcome, True, 2)


def test_a_client_that_goes_away_takes_the_call_with_it(tmp_path: Path) -> None:
    words = " ".join(["word"] * 4000)
    with loopback(small=words) as models:
        models.delay_s = 0.005
        with served(configured(models.address, "small"), tmp_path) as gateway:
            body = json.dumps(
                {"model": "small", "messages": [{"role": "user", "content": "x"}], "stream": True}
            )
            for num_bytes in (0, 1, 2000):
                client = socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S)
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                client.sendall(f"{head}{len(body)}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
                got = b""
                while len(got) < num_bytes:
                    got += client.recv(1000)
                time.sleep(0 if num_bytes else 0.1)
                client.close()
            _until(lambda: len(models.gone) == 3)
            calls = gateway.calls()
            assert gateway.balance() == (sum(one["cost"] for one in calls), 0)
            assert gateway.opened.gateway.trier.limits._under_way.total() == 0
    assert [one["outcome"] for one in calls] == ["cancelled"] * 3
    assert all(one["estimated"] and one["output_tokens"] < 4000 for one in calls)


def _until(holds: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_upstream_that_asks_for_time_gets_it(tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> str:
        return "rate" if number == 0 else "now"

    with loopback(small=script) as models:
        models.retry_after = "0.3"
        with served(configured(models.address, "small"), tmp_path) as gateway:
            begun = time.monotonic()
            status, body, headers = gateway.chat("small")
            taken = time.monotonic() - begun
    assert (status, body["choices"][0]["message"]["content"]) == (200, "now")
    assert taken >= 0.3
    assert headers["x-mixtura-attempts"] == "2"


def test_what_fails_is_left_alone(tmp_path: Path) -> None:
    with loopback(small="fault", large="well") as models:
        config = configured(
            models.address, "small", "large", cards={"small": {"fallbacks": ["large"]}},
            resting={"failures": 2, "rest_s": 1000},
        )  # fmt: skip
        with served(config, tmp_path) as gateway:
            for _ in range(5):
                assert gateway.chat("small")[2]["x-mixtura-model"] == "large"
            assert len(models.of("small")) == 2
            assert list(gateway.opened.gateway.trier.rests.resting()) == ["model small"]


def test_what_has_rested_is_tried_by_one() -> None:
    now = [0.0]
    rests = Rests(Resting(failures=2, window_s=10, rest_s=5), clock=lambda: now[0])

    def fails(outcome: Outcome = "broken", after_s: float | None = None) -> None:
        assert rests.wait_s("m", "u") == 0
        rests.saw("m", "u", outcome, after_s)

    fails()
    now[0] = 11
    fails()
    assert rests.wait_s("m", "u") == 0, "the first is forgotten"
    rests.saw("m", "u", "timeout")
    assert rests.wait_s("m", "u") == 5
    assert rests.wait_s("n", "u") == 0, "another model there is not at fault"
    rests.saw("n", "u", "ok")
    now[0] = 16
    assert rests.wait_s("m", "u") == 0
    assert rests.wait_s("m", "u") > 0, "one tries, the others wait for what comes of it"
    rests.saw("m", "u", "cancelled")
    fails()
    assert rests.wait_s("m", "u") == 5, "that one failed, too"
    now[0] = 21
    fails("ok")
    assert [rests.wait_s("m", "u") for _ in range(3)] == [0, 0, 0]
    rests.saw("m", "u", "quota")
    assert (rests.wait_s("m", "u"), rests.wait_s("n", "u")) == (5, 5)
    now[0] = 26
    fails("rate", 60.0)
    assert rests.wait_s("n", "u") == 60


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served(configured(f"http://127.0.0.1:{port}/v1", "small", attempts=2), tmp_path) as gateway:
        status, body, _ = gateway.chat("small")
        assert gateway.balance() == (0, 0)
        assert [one["outcome"] for one in gateway.calls()] == ["down", "down"]
    assert status == 503
    assert "small cannot be reached" in body["error"]["message"]


def test_the_upstreams_key_goes_to_the_upstream_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream")
    with loopback(small="fine", bad="auth") as models:
        config = configured(models.address, "small", "bad", upstream={"key": "UPSTREAM_KEY"})
        config["keys"] = {"alice": {"secret": "KEY_ALICE", "admin": True}}
        with served(config, tmp_path) as gateway:
            shown = [
                gateway.chat("small", key="alice"),
                gateway.chat("bad", key="alice"),
                gateway.chat("small", key="x"),
            ]
            shown += [gateway.ask(path, key="alice") for path in ("/stats", "/metrics", "/v1/models", "/")]
    assert [one["Authorization"] for one in models.headers] == ["Bearer sk-upstream"] * 2
    assert "alice" not in json.dumps(models.asked)
    assert "sk-upstream" not in json.dumps(shown)
    assert "sk-upstream" not in caplog.text
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"sk-upstream" not in kept
    assert b"one two three" not in kept, "prompts are not written down unless asked for"
