"""Routers, policies, feedback, the log, the cache and what is shown: through a real gateway."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("aiohttp")
pytest.importorskip("limits")

import openai
import sqlalchemy as sa
from gateway_helpers import TOKEN, configured, served
from loopback_models import loopback

from mixtura.running.composing.fitted import fit_model_router
from mixtura.running.composing.reading import read_table
from mixtura.serving.dashboard import page
from mixtura.serving.gateway.caching import Answers, content_of
from mixtura.serving.gateway.config import Cache
from mixtura.serving.gateway.ledger import DECISIONS
from mixtura.serving.gateway.tracing import Tracer
from mixtura.serving.gateway.watching import outcomes

SUMS, CITIES = "add the numbers {} and {}", "name the capital city of land {} {}"


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router that has learned that sums are for small and cities for large."""
    folder = tmp_path_factory.mktemp("router")
    rows = [
        {"prompt": text.format(n, n + 1), "model": model, "score": int((model == "small") == (text is SUMS)),
         "task": task, "input_tokens": 6, "output_tokens": 4}
        for n in range(40) for text, task in ((SUMS, "sum"), (CITIES, "city")) for model in ("small", "large")
    ]  # fmt: skip
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cards.json").write_text(
        json.dumps([{"name": name, "input_price": 10, "output_price": 10} for name in ("small", "large")])
    )
    fit_model_router(read_table(folder / "table.jsonl", folder / "cards.json"), "knn").save(folder / "fitted")
    return folder / "fitted"


def decisions(gateway: Any) -> list[dict[str, Any]]:
    gateway.settled()
    with gateway.opened.books._engine.begin() as connection:
        return [
            dict(row) for row in connection.execute(sa.select(DECISIONS).order_by(DECISIONS.c.at)).mappings()
        ]


def test_prompts_go_where_the_router_says_and_the_log_says_why(tmp_path: Path, router: Path) -> None:
    with loopback(small="a", large="b c") as models:
        config = configured(models.address, "small", "large", keep_text=True)
        config["routers"] = {"auto": {"path": str(router), "explore": 0.2}}
        with served(config, tmp_path) as gateway:
            first = gateway.chat("auto", SUMS.format(3, 4))[2]
            for n in range(30):
                gateway.chat("auto", CITIES.format(50 + n, 0))
            request = first["x-mixtura-request"]
            assert gateway.ask("/v1/feedback", {"request": request, "score": 0.75})[0] == 200
            assert gateway.ask("/v1/feedback", {"request": "none", "score": 1})[0] == 404
            noted = decisions(gateway)
            with gateway.opened.books._engine.begin() as connection:
                rows = list(outcomes(connection))
            stats = gateway.ask("/stats")[1]
    assert len(models.of("small")) > 1, "some are drawn at random"
    assert len(models.of("large")) > 20
    assert {one["how"] for one in noted} == {"router", "explored"}
    for one in noted:
        assert one["propensity"] == pytest.approx(0.9 if one["how"] == "router" else 0.1)
    assert json.loads(noted[0]["scores"])["small"] > json.loads(noted[0]["scores"])["large"]
    # The log is a table that `mixtura route` reads.
    assert rows[0]["prompt"] == SUMS.format(3, 4)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_table(tmp_path / "log.jsonl")
    (judged,) = [one for one in table.outcomes if one.score is not None]
    assert (judged.score, judged.propensity) == (0.75, pytest.approx(noted[0]["propensity"]))
    assert sum(one["num"] for one in stats["decisions"]) == 31
    (shown,) = [one for one in stats["models"] if one["judged"]]
    assert (shown["model"], shown["score"]) == (first["x-mixtura-model"], 0.75)


def test_a_conversation_stays_with_its_model(tmp_path: Path, router: Path) -> None:
    begun = [{"role": "user", "content": SUMS.format(1, 2)}]
    more = [*begun, {"role": "assistant", "content": "3"}, {"role": "user", "content": CITIES.format(7, 7)}]
    with loopback(small="a", large="b") as models:
        config = configured(models.address, "small", "large")
        config["routers"] = {"auto": {"path": str(router)}, "free": {"path": str(router), "sticky": False}}
        with served(config, tmp_path) as gateway:
            bodies = [
                {"model": name, "messages": said} for name in ("auto", "free") for said in (begun, more)
            ]
            found = [gateway.ask("/v1/chat/completions", body)[2]["x-mixtura-model"] for body in bodies]
            assert [one["how"] for one in decisions(gateway)] == ["router", "sticky", "router", "router"]
            assert [one["prompt"] for one in decisions(gateway)] == [None] * 4
    assert found == ["small", "small", "small", "large"]


def test_where_no_model_is_trusted(tmp_path: Path, router: Path) -> None:
    with loopback(small="a", large="b") as models:
        config = configured(models.address, "small", "large")
        config["routers"] = {
            "strict": {"path": str(router), "floor": 1.0},
            "mild": {"path": str(router), "floor": 1.0, "fallback": "large"},
        }
        with served(config, tmp_path) as gateway:
            status, body, _ = gateway.chat("strict", "something else entirely")
            assert gateway.chat("mild", "something else entirely")[2]["x-mixtura-model"] == "large"
            assert [one["how"] for one in decisions(gateway)] == ["abstained", "fallback"]
            assert 'mixtura_gateway_abstained_total{asked="strict"} 1.0' in gateway.ask("/metrics")[1]
    assert (status, body["error"]["code"]) == (422, "abstained")
    assert len(models.asked) == 1


def test_a_policy_is_a_model_of_several_calls(tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> str:
        return f"the answer is {body['seed']}"

    with loopback(small=script, large="the answer is 7", bad="fault") as models:
        config = configured(models.address, "small", "large", "bad", resting={"rest_s": 0.2})
        config["policies"] = {
            "careful": {
                "aggregator": "cascade",
                "models": ["small", "large"],
                "settings": {"num_samples": 2},
            },
            "hopeless": {"aggregator": "vote", "models": ["bad"]},
        }
        with served(config, tmp_path) as gateway:
            status, body, headers = gateway.chat("careful")
            assert gateway.balance() == (sum(one["cost"] for one in gateway.calls()), 0)
            assert len({one["request"] for one in gateway.calls()}) == 1
            events = gateway.events("careful", stream_options={"include_usage": True})
            failed = gateway.chat("hopeless")
            told = gateway.ask("/v1/completions", {"model": "careful", "prompt": "x"})
            tools = gateway.chat("careful", tools=[{"type": "function", "function": {"name": "f"}}])
            (noted, *_) = decisions(gateway)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "the answer is 7")
    assert headers["x-mixtura-calls"] == "3"
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
    assert float(headers["x-mixtura-cost-usd"]) == pytest.approx(21 * 1e-5)
    assert [one["choices"][0]["finish_reason"] for one in events[:2]] == [None, "stop"]
    assert events[2]["usage"]["total_tokens"] == 21
    assert failed[0] == 502
    assert (told[0], tools[0]) == (400, 400)
    assert "text alone" in told[1]["error"]["message"]
    assert (noted["how"], noted["asked"]) == ("policy", "careful")


def test_a_policys_budget_cuts_its_calls(tmp_path: Path) -> None:
    with loopback(small="the answer is 1", large="the answer is 7") as models:
        config = configured(models.address, "small", "large", cards={"large": {"output_price": 1000.0}})
        config["policies"] = {"both": {"aggregator": "vote", "models": ["small", "large"]}}
        config["keys"] = {"alice": {"secret": "KEY_ALICE", "budget": 0.005}}
        with served(config, tmp_path) as gateway:
            status, body, _ = gateway.chat("both", key="alice", max_tokens=20)
            spent, held = gateway.balance("alice")
    assert (status, body["choices"][0]["message"]["content"]) == (200, "the answer is 1")
    assert models.of("large") == []
    assert (spent, held) == (7 * TOKEN, 0)


def test_the_official_client(tmp_path: Path) -> None:
    with loopback(small="a b c", cut="cut:2") as models:
        config = configured(models.address, "small", "cut")
        config["keys"] = {
            "alice": {"secret": "KEY_ALICE", "models": ["small", "cut"]},
            "bob": {"secret": "KEY_BOB", "models": []},
        }
        with served(config, tmp_path) as gateway:
            client = openai.OpenAI(base_url=gateway.address, api_key="alice", max_retries=0)
            messages: Any = [{"role": "user", "content": "x"}]
            answer = client.chat.completions.create(model="small", messages=messages)
            assert (answer.choices[0].message.content, answer.usage.total_tokens) == ("a b c", 4)  # type: ignore[union-attr]
            parts = client.chat.completions.create(model="small", messages=messages, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == "a b c"
            assert [model.id for model in client.models.list()] == ["small", "cut"]
            assert client.completions.create(model="small", prompt="x").choices[0].text == "a b c"
            with pytest.raises(openai.NotFoundError, match="did you mean 'small'"):
                client.chat.completions.create(model="smal", messages=messages)
            with pytest.raises(openai.APIError, match="broke off"):
                list(client.chat.completions.create(model="cut", messages=messages, stream=True))
            other = openai.OpenAI(base_url=gateway.address, api_key="bob", max_retries=0)
            with pytest.raises(openai.NotFoundError):
                other.chat.completions.create(model="small", messages=messages)
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=gateway.address, api_key="no", max_retries=0).models.list()


def test_what_others_may_not_see(tmp_path: Path) -> None:
    with loopback(small="a") as models:
        config = configured(models.address, "small")
        config["keys"] = {
            "alice": {"secret": "KEY_ALICE"},
            "bob": {"secret": "KEY_BOB"},
            "admin": {"secret": "KEY_ADMIN", "admin": True},
        }
        with served(config, tmp_path) as gateway:
            request = gateway.chat("small", key="alice")[2]["x-mixtura-request"]
            feedback = {"request": request, "score": 1}
            assert gateway.ask("/v1/feedback", feedback, key="bob")[0] == 404
            assert gateway.ask("/v1/feedback", feedback, key="alice")[0] == 200
            for path in ("/stats", "/metrics"):
                assert [gateway.ask(path, key=key)[0] for key in (None, "alice", "admin")] == [401, 403, 200]
            assert [gateway.ask(path)[0] for path in ("/", "/health", "/ready", "/v1/models")] == [
                200,
                200,
                200,
                401,
            ]
            assert gateway.ask("/health", headers={"Host": "evil.example"})[0] == 403


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", {}, {"model": "small"}, {"model": "small", "messages": []}, {"model": 1, "messages": [{}]},
     {"model": "small", "messages": [{}], "max_tokens": -1}, {"model": "small", "messages": [{}], "n": 0},
     {"model": "small", "messages": "x"}, {"model": "small", "messages": [{}], "stream_options": 3}],
)  # fmt: skip
def test_bodies_that_are_none(tmp_path: Path, body: Any) -> None:
    with served(configured("http://127.0.0.1:1/v1", "small"), tmp_path) as gateway:
        status, found, _ = gateway.ask("/v1/chat/completions", body)
        assert gateway.calls() == []
    assert status == 400
    assert found["error"]["message"]


def test_answers_are_given_again_only_where_that_is_asked_for(tmp_path: Path) -> None:
    with loopback(small="a b") as models:
        for cache, expected in ((None, 4), ({"verify": 0.0}, 3), ({"near": 0.5, "verify": 0.0}, 2)):
            models.asked.clear()
            folder = tmp_path / str(expected)
            folder.mkdir()
            with served(configured(models.address, "small", cache=cache), folder) as gateway:
                again = "What is the capital of Peru?"
                texts = [again, again, "Please tell me: what is the capital of Peru?", "What is not Peru?"]
                found = [gateway.chat("small", text, temperature=0) for text in texts]
                assert len(gateway.calls()) == expected
            assert {body["choices"][0]["message"]["content"] for _, body, _ in found} == {"a b"}
            assert len(models.asked) == expected


def test_what_the_cache_holds_apart() -> None:
    cache = Answers(Cache(near=0.5, verify=0.0))
    chat = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "is 5 more than 3?"}]}

    def asked(**change: Any) -> Any:
        return cache.find("alice", "chat", {**chat, **change})

    def says(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    cache.keep("alice", "chat", chat, {"choices": [{"text": "yes"}]}, "m")
    assert asked().kind == "exact"
    assert asked(messages=says("please: is 5 more than 3?")).kind == "near"
    assert asked(messages=says("is 3 more than 5?")) is None
    assert asked(messages=says("isn't 5 more than 3?")) is None
    assert asked(messages=[{"role": "system", "content": "lie"}, *says("is 5 more than 3?")]) is None
    assert asked(model="n") is None
    assert asked(max_tokens=3) is None
    assert asked(temperature=0.5) is None
    assert asked(stream=True) is None
    assert cache.find("bob", "chat", chat) is None
    cache.compare(asked(), {"choices": [{"text": "no"}]})
    assert (cache.verified, cache.right) == (1, 0)
    assert asked() is None
    assert content_of("don't go") != content_of("do go")


def test_answers_grow_old() -> None:
    now = [0.0]
    cache = Answers(Cache(age_s=10, entries=2, verify=0.0), clock=lambda: now[0])
    for name in "abc":
        cache.keep("x", "chat", {"model": name, "prompt": "p", "seed": 1}, {}, "m")
    assert cache.find("x", "chat", {"model": "a", "prompt": "p", "seed": 1}) is None
    assert cache.find("x", "chat", {"model": "c", "prompt": "p", "seed": 1}) is not None
    now[0] = 11.0
    assert cache.find("x", "chat", {"model": "c", "prompt": "p", "seed": 1}) is None


def test_the_page_has_all_that_it_needs() -> None:
    text = page("gateway.html")
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)
    assert not re.search(r"<(?:link|script|img)[^>]*(?:src|href)=", text)
    wanted = set(re.findall(r'\$\("(\w+)"\)', text))
    assert wanted
    assert wanted <= set(re.findall(r'id="(\w+)"', text))
    assert "prefers-color-scheme: dark" in text
    # What a user or an upstream names is text, never markup.
    assert "innerHTML" not in text


def test_spans_have_names_and_no_words_of_prompts(tmp_path: Path) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with loopback(small="fault", large="a") as models:
        config = configured(models.address, "small", "large", cards={"small": {"fallbacks": ["large"]}})
        with served(config, tmp_path, Tracer(provider)) as gateway:
            gateway.chat("small", "secret words")
            spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["mixtura.call", "mixtura.call", "mixtura.request"]
    assert [span.attributes["mixtura.model"] for span in spans[:2]] == ["small", "large"]  # type: ignore[index]
    assert {span.context.trace_id for span in spans} == {spans[0].context.trace_id}
    assert "secret words" not in "".join(span.to_json() for span in spans)
