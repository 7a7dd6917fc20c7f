"""Plans that are run: on tables, behind an address, within a budget, many at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from mixtura.errors import BudgetError, UnknownNameError, UserError
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators.cascade import Cascade
from mixtura.methods.aggregators.self_consistency import SelfConsistency
from mixtura.methods.aggregators.self_moa import SelfMoa
from mixtura.methods.aggregators.single import Single
from mixtura.methods.aggregators.vote import Vote
from mixtura.running.composing.asking import Ledger, Runner, most_cost
from mixtura.running.composing.planted import planted
from mixtura.running.composing.tables import make_table
from mixtura.running.composing.upstreams import KEY_VARIABLE, OpenAI, Replay
from mixtura.types.asking import Ask, Reply, Verdict
from mixtura.types.models import Message, ModelCard, Outcome, Prompt

CARDS = tuple(ModelCard(name=name, input_price=1, output_price=10, max_output=20) for name in "abc")


def prompts(number: int) -> list[Prompt]:
    return [Prompt(id=str(n), text=f"question {n}") for n in range(number)]


def fixed(ask: Ask) -> Reply:
    return Reply(text="x", input_tokens=5, output_tokens=5)


def test_money_is_set_aside_and_settled() -> None:
    ledger = Ledger(100)
    assert ledger.reserve(60)
    assert not ledger.reserve(41)
    ledger.settle(60, 10)
    assert (ledger.spent, ledger.reserved) == (10, 0)
    assert ledger.reserve(90)
    assert not ledger.reserve(1)


def test_threads_together_never_pass_the_budget() -> None:
    ledger = Ledger(1000)
    most = []

    def spend() -> None:
        for _ in range(200):
            if ledger.reserve(7):
                most.append(ledger.spent + ledger.reserved)
                ledger.settle(7, 5)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 1000
    assert ledger.reserved == 0
    assert 993 <= ledger.spent <= 1000


def test_the_bound_of_a_call_is_above_any_way_to_cut_its_text_into_tokens() -> None:
    ask = Ask(model="a", messages=(Message("user", "ä" * 50),), max_tokens=8)
    assert most_cost(ask, CARDS[0]) == 100 + 16 + 8 * 10
    assert most_cost(ask, ModelCard(name="free")) is None


def test_a_budget_for_two_calls_makes_two() -> None:
    bound = most_cost(Ask(model="a", messages=(Message("user", "question 0"),)), CARDS[0])
    assert bound is not None
    answer = Runner(CARDS, fixed, Ledger(2 * bound)).run(Vote(), prompts(1)[0])
    assert [call.reply.outcome for call in answer.calls] == ["ok", "ok", "budget"]
    with pytest.raises(BudgetError, match="the budget is below the dearest possible answer"):
        Runner(CARDS, fixed, Ledger(bound - 1)).run(Vote(), prompts(1)[0])


def test_a_model_without_prices_does_not_fit_a_budget() -> None:
    free = ModelCard(name="free")
    with pytest.raises(BudgetError):
        Runner([free], fixed, Ledger(10**9)).run(Single(), prompts(1)[0])
    assert Runner([free], fixed).run(Single(), prompts(1)[0]).text == "x"


def test_many_prompts_are_asked_model_by_model_and_in_time_of_one() -> None:
    asked: list[str] = []

    def note(ask: Ask) -> Reply:
        asked.append(ask.model)
        return fixed(ask)

    answers = Runner(CARDS, note, num_threads=1).run_all(Vote(), prompts(5))
    assert asked == ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    assert len(answers) == 5

    def slow(ask: Ask) -> Reply:
        together.wait(timeout=20)
        return fixed(ask)

    # All calls of a step have to be under way at once for any to return.
    together = threading.Barrier(6)
    assert (
        len(Runner(CARDS[:1], slow, num_threads=6).run_all(SelfConsistency(num_samples=3), prompts(2))) == 2
    )


def test_replies_come_back_in_the_order_of_the_asks() -> None:
    def uneven(ask: Ask) -> Reply:
        time.sleep(0.02 * (3 - ask.sample))
        return Reply(text=f"{ask.model}{ask.sample}")

    answer = Runner(CARDS, uneven).run(SelfConsistency(num_samples=3), prompts(1)[0])
    assert [call.reply.text for call in answer.calls] == ["a0", "a1", "a2"]


class _Strange(Aggregator):
    def plan(self, prompt: Prompt, models: Any) -> Plan:
        try:
            yield [Ask(model="nobody", messages=prompt.conversation())]
        finally:
            closed.append(prompt.id)
        return Verdict("")

    def most_calls(self, num_models: int) -> int:
        return 1


closed: list[str] = []


def test_a_plan_that_goes_wrong_closes_all_and_keeps_no_money() -> None:
    closed.clear()
    with pytest.raises(UnknownNameError, match="no model named 'nobody'"):
        Runner(CARDS, fixed).run_all(_Strange(), prompts(3))
    assert sorted(closed) == ["0", "1", "2"]
    ledger = Ledger(10**6)

    def raises(ask: Ask) -> Reply:
        raise RuntimeError("a fault of the upstream's own")

    with pytest.raises(RuntimeError):
        Runner(CARDS, raises, ledger).run(Vote(), prompts(1)[0])
    assert (ledger.spent, ledger.reserved) == (0, 0)


def test_no_model_at_all() -> None:
    with pytest.raises(UserError, match="there is no model to ask"):
        Runner([], fixed)


def test_a_table_replies_with_its_rows() -> None:
    table = planted(30)
    answers = Runner(table.cards, Replay(table)).run_all(Vote(), table.prompts)
    by_pair = {(one.prompt, one.model): one.answer for one in table.outcomes}
    for prompt, answer in zip(table.prompts, answers, strict=True):
        said = [by_pair[prompt.id, name] for name in table.names]
        assert [call.reply.text for call in answer.calls] == said
        assert said.count(answer.text) == max(said.count(one) for one in said)
    spent = sum(call.reply.cost for answer in answers for call in answer.calls)
    assert spent == sum(round(cost) for cost in table.costs.ravel()) > 0


def test_what_a_table_cannot_answer() -> None:
    prompt = Prompt(id="p", text="?")
    rows = [Outcome(prompt="p", model="a", score=1.0, answer=text) for text in ("x", "y")]
    table = make_table([prompt], CARDS[:1], rows)
    drawn = Runner(table.cards, Replay(table)).run(SelfConsistency(num_samples=3), prompt)
    assert [(call.reply.text, call.reply.outcome) for call in drawn.calls] == [
        ("x", "ok"), ("y", "ok"), ("", "broken"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="a table cannot answer that; take one with the tag 'replays'"):
        Runner(table.cards, Replay(table)).run(SelfMoa(num_samples=2), prompt)
    with pytest.raises(UserError, match="the table has no answers to replay"):
        Replay(make_table([prompt], CARDS, [Outcome(prompt="p", model="a", score=1.0)]))


class _Handler(BaseHTTPRequestHandler):
    """A server of the OpenAI format whose models are named by what they do."""

    seen: ClassVar[list[tuple[str, dict[str, Any], str | None]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body, self.headers.get("Authorization")))
        does = body["model"]
        if does.isdigit():
            self.send_error(int(does))
            return
        if does == "slow":
            time.sleep(1.0)
        said = {"choices": [{"message": {"role": "assistant", "content": does}, "finish_reason": "stop"}]}
        if does == "counting":
            said["usage"] = {"prompt_tokens": 7, "completion_tokens": 3}  # type: ignore[assignment]
        text = json.dumps({} if does == "empty" else said) if does != "nonsense" else "<html>"
        self.send_response(200)
        # One that says it sends more than it does breaks off.
        self.send_header("Content-Length", str(len(text) + 50 * (does == "cut")))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        del arguments


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_models_behind_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    card = replace(CARDS[0], address=address, model="counting")
    answer = Runner([card], OpenAI([card])).run(Single(), Prompt(id="0", text="2 + 2?", max_tokens=9))
    (call,) = answer.calls
    assert (answer.text, call.reply.input_tokens, call.reply.output_tokens) == ("counting", 7, 3)
    assert answer.cost == 7 * 1 + 3 * 10
    assert call.reply.latency_ms > 0
    path, body, key = _Handler.seen[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "user", "content": "2 + 2?"}]
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (9, 0.0, 0)


@pytest.mark.parametrize(
    ("does", "outcome"),
    [
        ("429", "rate"),
        ("401", "auth"),
        ("402", "quota"),
        ("400", "refused"),
        ("500", "broken"),
        ("504", "timeout"),
        ("nonsense", "broken"),
        ("empty", "broken"),
        ("cut", "broken"),
        ("slow", "timeout"),
    ],
)
def test_what_goes_wrong_is_the_outcome_and_the_next_model_is_asked(
    address: str, does: str, outcome: str
) -> None:
    cards = [replace(CARDS[0], address=address, model=does), replace(CARDS[1], address=address, model="fine")]
    answer = Runner(cards, OpenAI(cards, timeout_s=0.3 if does == "slow" else 20)).run(
        Single(), prompts(1)[0]
    )
    assert [call.reply.outcome for call in answer.calls] == [outcome, "ok"]
    assert answer.text == "fine"


def test_nobody_listens_and_no_address() -> None:
    card = replace(CARDS[0], address="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"no model answered \(1 broken\); see whether they can be reached"):
        Runner([card], OpenAI([card])).run(Single(), prompts(1)[0])
    with pytest.raises(UserError, match="the card of a has the address ''; give one such as"):
        OpenAI(CARDS)


def test_a_cascade_over_real_servers_stops_early(address: str) -> None:
    cards = [
        replace(CARDS[0], address=address, model="sure", output_price=1),
        replace(CARDS[1], address=address, model="dear", output_price=99),
    ]
    answer = Runner(cards, OpenAI(cards)).run(Cascade(num_samples=2), prompts(1)[0])
    assert answer.text == "sure"
    assert [call.ask.model for call in answer.calls] == ["a", "a"]
