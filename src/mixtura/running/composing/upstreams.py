"""What answers asks: a table of answers, or models behind an address that speaks the OpenAI format."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any, Final, final

from mixtura.errors import UserError
from mixtura.running.composing.tables import ReplayTable
from mixtura.types.asking import Ask, Outcome, Reply
from mixtura.types.models import CHARS_PER_TOKEN, ModelCard

KEY_VARIABLE: Final = "MIXTURA_UPSTREAM_KEY"
# What reading and taking apart a response that is none may raise.
_BROKEN: Final = (HTTPException, ValueError, KeyError, IndexError, TypeError, AttributeError)
_STATUSES: Final[Mapping[int, Outcome]] = {
    401: "auth",
    402: "quota",
    403: "auth",
    408: "timeout",
    429: "rate",
    504: "timeout",
}


def outcome_of(status: int) -> Outcome:
    """What a response's status says of a call that was not answered.

    >>> outcome_of(429), outcome_of(400), outcome_of(503)
    ('rate', 'refused', 'broken')
    """
    return _STATUSES.get(status, "broken" if status >= 500 or status < 400 else "refused")


@final
class Replay:
    """A table that answers plain asks from its rows: the first sample from a pair's first row, and so on.

    Raises:
        UserError: the table has no answers.
    """

    def __init__(self, table: ReplayTable) -> None:
        self._rows: dict[tuple[str, str], list[Reply]] = defaultdict(list)
        prompts = {prompt.id: prompt for prompt in table.prompts}
        for one in table.outcomes:
            if one.answer is not None:
                prompt = prompts[one.prompt]
                reply = Reply(
                    text=one.answer,
                    input_tokens=prompt.input_tokens if one.input_tokens is None else one.input_tokens,
                    output_tokens=one.output_tokens or 0,
                    cost=round(one.cost or 0),
                    latency_ms=one.latency_ms or 0.0,
                )
                self._rows[prompt.conversation()[-1].content, one.model].append(reply)
        if not self._rows:
            raise UserError("the table has no answers to replay; give a column 'answer'")

    def __call__(self, ask: Ask) -> Reply:
        """The answer of the table; broken where it has none, refused where the ask is not the plain prompt.

        Raises:
            UserError: the plan asks something that no table can answer.
        """
        if not ask.plain:
            raise UserError(
                "this plan asks models more than the prompt itself, and a table cannot answer that; take one "
                "with the tag 'replays', or ask models"
            )
        rows = self._rows.get((ask.messages[-1].content, ask.model), [])
        return rows[ask.sample] if ask.sample < len(rows) else Reply(outcome="broken")


@final
class OpenAI:
    """Models behind addresses that speak the OpenAI format: `mixtura serve`, llama-server, vLLM, and others.

    A card's address is the base, such as ``http://127.0.0.1:8000/v1``. The key comes from the environment
    variable `KEY_VARIABLE`, and is sent only to these addresses.

    Args:
        cards: of the models.
        timeout_s: seconds that a call may wait for a byte.

    Raises:
        UserError: a card has no address.
    """

    def __init__(self, cards: Sequence[ModelCard], timeout_s: float = 120.0) -> None:
        for card in cards:
            if not card.address.startswith(("http://", "https://")):
                raise UserError(
                    f"the card of {card.name} has the address {card.address!r}; give one such as "
                    "http://127.0.0.1:8000/v1"
                )
        self._cards = {card.name: card for card in cards}
        self._timeout_s = timeout_s

    def __call__(self, ask: Ask) -> Reply:
        """One call, without a second try; what goes wrong is the reply's outcome."""
        begun = time.monotonic()
        try:
            with urllib.request.urlopen(self._request(ask), timeout=self._timeout_s) as response:
                found = json.loads(response.read())
            reply = reply_in(found, ask)
        except urllib.error.HTTPError as error:
            error.close()
            reply = Reply(outcome=outcome_of(error.code))
        except TimeoutError:
            reply = Reply(outcome="timeout")
        except (*_BROKEN, OSError) as error:
            timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
            reply = Reply(outcome="timeout" if timed_out else "broken")
        taken = (time.monotonic() - begun) * 1000
        return Reply(
            text=reply.text, outcome=reply.outcome, input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens, latency_ms=taken, logprob=reply.logprob,
        )  # fmt: skip

    def _request(self, ask: Ask) -> urllib.request.Request:
        card = self._cards[ask.model]
        limits = [one for one in (ask.max_tokens, card.max_output) if one is not None]
        body = body_of(ask) | {"model": card.model or card.name}
        if limits:
            body["max_tokens"] = min(limits)
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        address = card.address.rstrip("/") + "/chat/completions"
        return urllib.request.Request(address, json.dumps(body).encode(), headers)


def body_of(ask: Ask) -> dict[str, Any]:
    """What to send for an ask, but for the model's name there and the limit of its answer."""
    messages = [{"role": one.role, "content": one.content} for one in ask.messages]
    if ask.prefill:
        messages.append({"role": "assistant", "content": ask.prefill})
    return {"messages": messages, "temperature": ask.temperature, "seed": ask.sample}


def reply_in(found: Any, ask: Ask) -> Reply:
    """The reply in a response's body; what it does not count is estimated from characters.

    Raises:
        KeyError, IndexError, TypeError, ValueError: it is none.
    """
    choice = found["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str) or not text:
        return Reply(outcome="refused" if choice.get("finish_reason") == "content_filter" else "broken")
    usage = found.get("usage") or {}
    read = sum(len(message.content) for message in ask.messages) // CHARS_PER_TOKEN + 1
    steps = (choice.get("logprobs") or {}).get("content") or []
    return Reply(
        text=text,
        input_tokens=int(usage.get("prompt_tokens", read)),
        output_tokens=int(usage.get("completion_tokens", len(text) // CHARS_PER_TOKEN + 1)),
        logprob=sum(step["logprob"] for step in steps) / len(steps) if steps else None,
    )
