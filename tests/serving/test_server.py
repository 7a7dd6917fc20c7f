"""A real server on this machine, asked over HTTP as clients ask."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_server import ENVIRONMENT
from tiny_checkpoints import run_mixtura, save_tiny

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from served import CHAT, LARGE, QUESTION, Server, post_of, wait_for
from serving_helpers import PATIENCE_S, SPECIMEN

from mixtura.running.generation import generate
from mixtura.serving.addresses import bound


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server(SPECIMEN)
    yield made
    made.opened.engine.close(0)


@pytest.fixture(scope="module")
def said(server: Server) -> str:
    """What the model answers when it is asked by itself."""
    engine = server.opened.engine
    return generate(engine.model, server.opened.tokenizer, QUESTION, chat=True, max_new_tokens=60).text


def test_a_conversation_is_answered(server: Server, said: str) -> None:
    status, body, _ = server.ask("/v1/chat/completions", {**CHAT, "model": "tiny"})
    assert status == 200
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["content"] == said
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_says_the_same(server: Server, said: str) -> None:
    events = server.events("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    *chunks, last = events
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 5


def test_a_longer_conversation_is_not_read_again(server: Server, said: str) -> None:
    turns = [{"role": "user", "content": QUESTION * 6}, {"role": "assistant", "content": said}]
    for _ in range(2):
        _, body, _ = server.ask("/v1/chat/completions", {**CHAT, "messages": turns, "max_tokens": 4})
        turns = [*turns, {"role": "user", "content": "And 3 + 4?"}]
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 20


def test_several_answers_with_log_probabilities(server: Server) -> None:
    request = {
        **CHAT,
        "n": 3,
        "temperature": 1.2,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 8,
    }
    _, first, _ = server.ask("/v1/chat/completions", request)
    _, second, _ = server.ask("/v1/chat/completions", request)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    for entry in first["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2


def test_a_text_is_continued_with_its_prompt_in_front(server: Server) -> None:
    request = {
        "prompt": "Question: 3 + 4 = ?",
        "temperature": 0,
        "max_tokens": 3,
        "echo": True,
        "logprobs": 1,
    }
    _, body, _ = server.ask("/v1/completions", request)
    (choice,) = body["choices"]
    assert choice["text"].startswith("Question: 3 + 4 = ?")
    table = choice["logprobs"]
    assert table["token_logprobs"][0] is None
    assert all(value <= 0 for value in table["token_logprobs"][1:])
    assert len(table["tokens"]) == len(table["text_offset"]) == len(table["top_logprobs"])
    assert len(table["tokens"]) == body["usage"]["total_tokens"]
    # As harnesses for likelihoods ask: nothing new, tokens instead of text, several at once.
    ids = server.opened.tokenizer("Question: 3 + 4 = ?")["input_ids"]
    _, body, _ = server.ask("/v1/completions", {**request, "prompt": [ids, ids], "max_tokens": 0})
    tables = [choice["logprobs"]["token_logprobs"] for choice in body["choices"]]
    assert tables[0] == tables[1]
    assert tables[0][1:] == pytest.approx(table["token_logprobs"][-3 - len(ids) + 1 : -3], abs=0.05)


def test_texts_stream_together(server: Server) -> None:
    events = server.events("/v1/completions", {"prompt": ["1 + 1 =", "2 + 2 ="], "n": 2, "max_tokens": 4})
    assert {event["choices"][0]["index"] for event in events} == {0, 1, 2, 3}


def test_an_answer_in_json(server: Server) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 99, "minimum": 0}, "ok": {"type": "boolean"}},
        "required": ["sum", "ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    _, body, _ = server.ask("/v1/chat/completions", {**CHAT, "response_format": form})
    found = json.loads(body["choices"][0]["message"]["content"])
    assert isinstance(found["sum"], int)
    assert isinstance(found["ok"], bool)
    assert body["choices"][0]["finish_reason"] == "stop"
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    status, body, _ = server.ask("/v1/chat/completions", {**CHAT, "response_format": bad})
    assert status == 400
    assert "schema" in body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b'{"messages": "\xff\xfe"}', "UTF-8"),
        (b"[" * 9000, "JSON"),
        (b'{"messages": [], "metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301, "messages"),
        ({**CHAT, "stop": "x" * 300}, "stop"),
        ({**CHAT, "temperatur": 1}, "did you mean 'temperature'"),
        ({**CHAT, "temperature": 3}, "temperature"),
        ({**CHAT, "messages": []}, "messages"),
        ({**CHAT, "messages": [{"role": "king", "content": "x"}]}, "role"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({**CHAT, "top_logprobs": 3}, "logprobs"),
        ({**CHAT, "logit_bias": {"x": 1}}, "'x'"),
        ({**CHAT, "logit_bias": {"99999999999": 1}}, "no token"),
        ({**CHAT, "max_tokens": 999}, "context of 256"),
        ({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, "leave tools out"),
        ({**CHAT, "chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ({**CHAT, "messages": [{"role": "user", "content": "word " * 400}]}, "context of 256"),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream"),
    ],
)
def test_what_cannot_be_answered_is_said(server: Server, body: Any, said: str) -> None:
    status, answer, _ = server.ask("/v1/chat/completions", body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_refusals(server: Server) -> None:
    assert server.ask("/v1/chat/completions", {**CHAT, "model": "gpt"})[0] == 404
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/models", method="DELETE")[0] == 405
    assert server.ask("/v1/completions", {"prompt": "x" * LARGE})[0] == 413
    assert server.ask("/v1/completions", {"prompt": [[]]})[0] == 400
    assert server.ask("/v1/completions", {"prompt": [10**9]})[0] == 400
    # A page of somebody else that made its name point to this machine.
    assert server.ask("/v1/models", headers={"Host": "evil.example"})[0] == 403
    lone = {"prompt": "a \ud800 b", "max_tokens": 2, "user": "\udfff"}
    assert server.ask("/v1/completions", lone)[0] == 200
    assert server.ask("/v1/completions", {**lone, "stop": "\ud800"})[0] == 400
    assert server.ask("/v1/completions", {**lone, "\ud800": 1})[0] == 400


def test_models_health_and_what_is_counted(server: Server, said: str) -> None:
    assert server.ask("/v1/models")[1]["data"][0]["id"] == "tiny"
    assert server.ask("/v1/models/tiny")[1]["max_model_len"] == 256
    assert server.ask("/health")[0] == server.ask("/ready")[0] == 200
    _, text, _ = server.ask("/metrics")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["mixtura_generated_tokens"].samples[0].value > 0
    layers = server.opened.engine.model.config.num_hidden_layers
    num = server.opened.engine.model.config.num_experts
    assert len(families["mixtura_expert_tokens"].samples) == layers * num
    snapshot = server.ask("/stats")[1]
    assert snapshot["tokens"]["new"] > 0
    assert "<canvas" in server.ask("/")[1]


def test_each_token_of_every_pass_is_counted_once(server: Server) -> None:
    engine = server.opened.engine
    top_k = engine.model.config.num_experts_per_tok

    def passed() -> int:
        counts = engine.counts
        return counts.prompt_tokens + counts.step_rows

    before, loads = passed(), [int(counts.sum()) for _, counts in server.opened.loads]
    server.ask("/v1/completions", {"prompt": [f"{n} + {n} = 9 8 7" for n in range(4)], "max_tokens": 12})
    for (_, counts), was in zip(server.opened.loads, loads, strict=True):
        assert int(counts.sum()) - was == (passed() - before) * top_k


def test_a_client_that_goes_frees_its_place(server: Server) -> None:
    engine = server.opened.engine
    before = engine.counts.finished["cancelled"]
    sent = post_of({"prompt": "1 + 1 =", "max_tokens": 240, "stream": True, "logit_bias": {"0": -100}})
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(sent)
        assert b"data:" in client.recv(4096) + client.recv(4096)
    wait_for(lambda: engine.num_running == 0)
    assert engine.counts.finished["cancelled"] == before + 1
    assert engine.prefixes.running_bytes == 0


def test_a_client_that_reads_slowly_keeps_nobody_waiting(server: Server, said: str) -> None:
    sent = post_of({"prompt": "1 + 1 =", "max_tokens": 200, "stream": True, "n": 2})
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(sent)
        time.sleep(0.1)
        _, answer, _ = server.ask("/v1/chat/completions", CHAT)
        assert answer["choices"][0]["message"]["content"] == said
    wait_for(lambda: server.opened.engine.num_running == 0)


def test_too_many_are_told_when_to_come_again(server: Server) -> None:
    long = {"prompt": ["1 + 1 ="] * 12, "max_tokens": 200, "stream": True, "logit_bias": {"0": -100}}
    sent = post_of(long)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(sent)
        wait_for(lambda: server.opened.engine.num_waiting >= 8)
        status, answer, headers = server.ask("/v1/chat/completions", CHAT)
    assert status == 429
    assert int({name.lower(): value for name, value in headers.items()}["retry-after"]) >= 1
    assert answer["error"]["code"] == "too_many_requests"
    wait_for(lambda: server.opened.engine.num_running + server.opened.engine.num_waiting == 0)


def test_the_official_client(server: Server, said: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "tiny"
    messages = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=60)
    assert whole.choices[0].message.content == said
    parts = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_completion_tokens=60, stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said
    text = client.completions.create(model="tiny", prompt="1 + 1 =", max_tokens=4, logprobs=1)
    assert len(text.choices[0].logprobs.tokens) == 4
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=messages)
    with pytest.raises(openai.BadRequestError, match="context of 256"):
        client.completions.create(model="tiny", prompt="x", max_tokens=999)


def test_keys_are_asked_for(tmp_path: Path) -> None:
    server = Server(save_tiny(tmp_path), keys=("secret", "other"), context=64)
    try:
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/metrics")[0] == server.ask("/stats")[0] == 401
        assert server.ask("/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert server.ask("/v1/models", headers={"Authorization": "Bearer other"})[0] == 200
        assert server.ask("/health")[0] == server.ask("/")[0] == 200
        # Without a chat template.
        headers = {"Authorization": "Bearer secret"}
        status, body, _ = server.ask("/v1/chat/completions", CHAT, headers=headers)
        assert status == 400
        assert "/v1/completions" in body["error"]["message"]
    finally:
        server.opened.engine.close(0)


def test_a_shard_that_goes_while_serving_from_disk(tmp_path: Path) -> None:
    from mixtura.running.tiers.opening import Wish

    path = save_tiny(tmp_path)
    wish = Wish(pool_slots=4)
    server = Server(path, memory=wish, context=64)
    try:
        request = {"prompt": "abc def", "temperature": 0, "max_tokens": 6}
        status, before, _ = server.ask("/v1/completions", request)
        assert status == 200
        assert server.ask("/stats")[1]["experts"]["demanded_bytes"] > 0
        (shard,) = path.glob("*.safetensors")
        whole = shard.read_bytes()
        shard.write_bytes(whole[:1000])
        status, answer, _ = server.ask("/v1/completions", {**request, "prompt": "xyz 0123456789"})
        assert status == 500
        assert answer["error"]["code"] == "model_unreadable"
        assert "model.safetensors" in answer["error"]["message"]
        events = server.ask("/v1/completions", {**request, "prompt": "zyx 9876543210", "stream": True})
        assert events[0] == 500
        # All there again, but for one byte of each page.
        damaged = bytearray(whole)
        damaged[4000::4096] = bytes(value ^ 1 for value in damaged[4000::4096])
        shard.write_bytes(damaged)
        status, answer, _ = server.ask("/v1/completions", {**request, "prompt": "fedcba 0"})
        assert status == 500
        assert "is not what it was" in answer["error"]["message"]
        shard.write_bytes(whole)
        assert server.ask("/v1/completions", request)[1]["choices"] == before["choices"]
        assert server.ask("/ready")[0] == 200
    finally:
        server.opened.engine.close(0)


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`mixtura serve` as a shell starts it, and its port."""
    made = subprocess.Popen(
        [sys.executable, "-m", "mixtura", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    try:
        assert made.stdout is not None
        line = made.stdout.readline()
        yield made, int(line.split("127.0.0.1:")[1].split("/")[0])
    finally:
        made.kill()
        made.wait()


@pytest.mark.slow
def test_the_command_ends_as_it_is_told(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    with process(str(path), "--context", "64", "--grace", "60") as (server, port):
        taken = run_mixtura("serve", str(path), "--port", str(port))
        assert taken.returncode == 2
        assert "is in use" in taken.stderr
        assert len(taken.stderr.strip().splitlines()) == 1
        body = {"prompt": "abc", "max_tokens": 50, "stream": True, "logit_bias": {"2": -100}}
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        assert answer.status == 200
        server.send_signal(signal.SIGTERM)
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "no.such.host.invalid"), "--host 127.0.0.1"),
        (("--keys-file", "missing"), "one key a line"),
        (("--cache", "lfu"), "--memory"),
        (("--max-body", "many"), "many"),
        (("--context", "100000"), "512 positions"),
        (("--cache-memory", "1KiB"), "too little"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(arguments: tuple[str, ...], said: str) -> None:
    done = run_mixtura("serve", "--port", "0", *arguments)
    assert done.returncode in (2, 3)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_for_its_log_ends_no_server(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mixtura", "serve", str(path), "--context", "64", "--port", str(port)]
    with open("/dev/full", "w") as full:
        made = subprocess.Popen(command, stdout=full, stderr=full, env={**os.environ, **ENVIRONMENT})
    try:
        wait_for(lambda: made.poll() is not None or asked_at(port, "abc") == 200)
        assert made.poll() is None
        made.send_signal(signal.SIGTERM)
        assert made.wait(PATIENCE_S) == 0
    finally:
        made.kill()
        made.wait()


@pytest.mark.slow
def test_told_to_end_under_load_it_answers_what_it_took(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    with process(str(path), "--context", "64", "--grace", "60", "--concurrency", "2") as (server, port):
        body = {"max_tokens": 50, "n": 8, "stream": True, "temperature": 0, "logit_bias": {"2": -100}}
        clients = []
        for place in range(6):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            sent = json.dumps({**body, "prompt": f"abc {place}"})
            client.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
            clients.append(client)
        wait_for(lambda: num_taken(port) == 48)
        server.send_signal(signal.SIGTERM)
        answers = [client.getresponse() for client in clients]
        assert all(answer.read().endswith(b"data: [DONE]\n\n") for answer in answers)
        with pytest.raises(OSError, match="refused"):
            asked_at(port, "late", quietly=False)
        assert server.wait(PATIENCE_S) == 0


def asked_at(port: int, prompt: str, *, quietly: bool = True) -> int | None:
    """The status of an answer; None where nobody listens yet."""
    try:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        body = json.dumps({"prompt": prompt, "max_tokens": 2})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return client.getresponse().status
    except OSError:
        if not quietly:
            raise
        return None


def num_taken(port: int) -> int:
    """Texts that have ended, run or wait."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    client.request("GET", "/stats")
    stats = json.loads(client.getresponse().read())
    return int(stats["running"] + stats["waiting"] + sum(stats["finished"].values()))
