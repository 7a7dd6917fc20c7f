"""Requests answered: who asks, what for, by which models, and what it came to."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool

from mixtura.errors import UserError
from mixtura.running.composing.asking import dollars
from mixtura.serving.api.answers import DONE, chained, event, streamed, until_gone
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.bodies import Asking
from mixtura.serving.gateway.caching import Answers, Found
from mixtura.serving.gateway.calling import CallError
from mixtura.serving.gateway.combining import CHAT, Combined, Policies
from mixtura.serving.gateway.config import Config, Key
from mixtura.serving.gateway.counting import size_of
from mixtura.serving.gateway.deciding import Choice, Chooser
from mixtura.serving.gateway.trying import Job, Streaming, Trier, handed_on
from mixtura.types.models import ModelCard

# Who asks where there are no keys.
ANYBODY: Final = "anybody"
_logger = logging.getLogger("mixtura")


@final
@dataclass(frozen=True, slots=True)
class Who:
    """Somebody who asks."""

    name: str
    key: Key

    @property
    def account(self) -> str:
        """Whose money it is: a budget that begins anew has an account a day or month."""
        form = {"": "", "day": "@%Y-%m-%d", "month": "@%Y-%m"}[self.key.per]
        return self.name + time.strftime(form, time.gmtime())


@final
class Gateway:
    """Everything behind the API.

    Args:
        config, cards: what there is.
        secrets: of keys, by name; none for nobody has to say who asks.
        trier: has requests answered.
    """

    def __init__(
        self, config: Config, cards: Mapping[str, ModelCard], secrets: Mapping[str, str], trier: Trier
    ) -> None:
        self.config = config
        self.trier = trier
        self.watch = trier.watch
        self.created = int(time.time())
        self.policies = Policies(config, cards, trier)
        self.cache = None if config.cache is None else Answers(config.cache)
        self._chooser = Chooser(config, cards)
        self._keys = {
            hashlib.sha256(secret.encode()).digest(): Who(name, config.keys[name])
            for name, secret in secrets.items()
        }

    def who(self, http: Request) -> Who:
        """Who asks; the guard has let in only those that there are."""
        if not self._keys:
            return Who(ANYBODY, Key(secret="NONE", admin=True))
        secret = http.headers.get("authorization", "").partition(" ")[2].strip()
        found = self._keys.get(hashlib.sha256(secret.encode("latin-1", "replace")).digest())
        if found is None:
            raise ApiError("this key is none of the gateway's", status=401, code="invalid_api_key")
        return found

    def names(self, who: Who) -> tuple[str, ...]:
        """What somebody may ask for."""
        return self.config.names if who.key.models is None else who.key.models

    def people(self) -> list[Who]:
        """All keys; anybody, where there are none."""
        return list(self._keys.values()) or [Who(ANYBODY, Key(secret="NONE", admin=True))]

    async def answer(self, http: Request, body: Asking, path: str) -> Response:
        """Answer a request.

        Raises:
            ApiError: it cannot be answered, or not as asked.
        """
        who = self.who(http)
        self._chooser.check(body.model, who.key.models)
        given = body.model_dump(exclude_unset=True)
        size = size_of(given, len(await http.body()))
        job = Job(
            request=uuid.uuid4().hex, asked=body.model, account=who.account, budget=who.key.limit, path=path,
            body=given, size=size, until=time.monotonic() + self.config.deadline_s,
        )  # fmt: skip
        tokens = size.read_estimate + (size.wanted or 0) * size.answers
        with ExitStack() as stack:
            stack.enter_context(self.trier.limits.admitted(who.name, who.key, tokens))
            stack.enter_context(self._counted())
            with self.trier.tracer.span("request", asked=body.model, key=who.name):
                response = await until_gone(http, self._answered(job, who, stack))
        return response

    async def _answered(self, job: Job, who: Who, stack: ExitStack) -> Response:
        if job.asked in self.policies:
            combined = await self.policies.run(job.asked, job)
            self._note(job, Choice((job.asked,), "policy"))
            return _combined(job, combined)
        found = None if self.cache is None else self.cache.find(who.name, job.path, job.body)
        if found is not None and not found.is_to_verify:
            self.watch.cached[found.kind] += 1
            return _whole(job, found.body, found.model, 0, {"x-mixtura-cache": found.kind})
        choice = await self._chosen(job, who)
        if job.body.get("stream"):
            return await self._streamed(job, choice, stack)
        data, attempt = await self.trier.whole(job, choice.models)
        self._remember(job, who, data, attempt.model, found)
        return _whole(job, data, attempt.model, attempt.charged, {"x-mixtura-attempts": str(attempt.number)})

    async def _chosen(self, job: Job, who: Who) -> Choice:
        choose = partial(self._chooser.choose, job.asked, job.request, who.name, job.body, job.size)
        if job.asked not in self.config.routers:
            return choose()
        # Embeddings and distances take milliseconds: not where others are answered.
        choice = await run_in_threadpool(choose)
        self._note(job, choice)
        if not choice.models:
            self.watch.abstained[job.asked] += 1
            raise ApiError(
                "no model is trusted with this; ask one by its name, or give the router a fallback",
                status=422, code="abstained",
            )  # fmt: skip
        return choice

    def _note(self, job: Job, choice: Choice) -> None:
        row = choice.row(job.request, job.account, job.asked, keep_text=self.config.keep_text)
        self.trier.later(self._noted(row))

    async def _noted(self, row: dict[str, Any]) -> None:
        try:
            await self.trier.books.run(partial(ledger.decide, row=row))
        except Exception:
            _logger.exception("a decision could not be noted")

    def _remember(self, job: Job, who: Who, data: dict[str, Any], model: str, found: Found | None) -> None:
        if self.cache is None:
            return
        if found is not None:
            self.watch.cached["verified"] += 1
            self.cache.compare(found, data)
        self.cache.keep(who.name, job.path, job.body, data, model)

    async def _streamed(self, job: Job, choice: Choice, stack: ExitStack) -> Response:
        streaming = await self.trier.stream(job, choice.models)
        options = job.body.get("stream_options") or {}
        events = _while_open(
            handed_on(
                streaming,
                wants_usage=bool(options.get("include_usage")),
                broke=partial(_broke, job, streaming),
            ),
            stack.pop_all(),
        )
        # Begun here, so that it is ended and billed even where nobody comes to read it.
        response = streamed(chained(await anext(events), events))
        response.headers.update(
            _headers(job, streaming.attempt.model, {"x-mixtura-attempts": str(streaming.attempt.number)})
        )
        return response

    def _counted(self) -> Any:
        return _UnderWay(self)


@final
class _UnderWay:
    """Counts a request while it is answered."""

    def __init__(self, gateway: Gateway) -> None:
        self._watch = gateway.watch

    def __enter__(self) -> None:
        self._watch.under_way += 1

    def __exit__(self, *error: object) -> None:
        self._watch.under_way -= 1


async def _while_open(events: AsyncGenerator[str, None], stack: ExitStack) -> AsyncGenerator[str, None]:
    """Events, with what is to be closed when they end or nobody wants them any more."""
    with stack:
        async with aclosing(events):
            async for one in events:
                yield one


def _broke(job: Job, streaming: Streaming, error: CallError) -> str:
    """The last event of an answer that breaks off: never one that looks like an end."""
    last = streaming.held[-1].data or {}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "error"}
    choice["delta" if job.path == CHAT else "text"] = {} if job.path == CHAT else ""
    sentence = f"the answer of {streaming.attempt.model} broke off ({error.outcome})"
    head: dict[str, Any] = {key: last[key] for key in ("id", "object", "created", "model") if key in last}
    return event({**head, "choices": [choice], **ApiError(sentence, status=502, code="broken").body})


def _headers(job: Job, model: str, more: Mapping[str, str]) -> dict[str, str]:
    # A name may have any characters; a header has only these.
    return {"x-mixtura-request": job.request, "x-mixtura-model": json.dumps(model)[1:-1], **more}


def _whole(job: Job, data: dict[str, Any], model: str, cost: int, more: Mapping[str, str]) -> Response:
    headers = _headers(job, model, {"x-mixtura-cost-usd": f"{dollars(cost):.12f}", **more})
    # In ASCII: what a model said need not be text that can be written in UTF-8.
    return Response(json.dumps(data).encode("ascii"), 200, headers, media_type="application/json")


def _combined(job: Job, combined: Combined) -> Response:
    """A policy's answer in the form of a model's."""
    answer, attempts = combined.answer, combined.attempts
    read, written = sum(one.tokens.read for one in attempts), sum(one.tokens.written for one in attempts)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    head = {"id": f"chatcmpl-{job.request}", "created": int(time.time()), "model": job.asked}
    refusal = "no answer was agreed on" if answer.abstained else None
    message = {"role": "assistant", "content": None if answer.abstained else answer.text, "refusal": refusal}
    headers = {"x-mixtura-calls": str(len(answer.calls))}
    if answer.confidence is not None:
        headers["x-mixtura-confidence"] = f"{answer.confidence:.4f}"
    if not job.body.get("stream"):
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        data = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return _whole(job, data, job.asked, answer.cost, headers)
    # Nothing of it is there before all of it is: one part, and the end.
    chunk = {**head, "object": "chat.completion.chunk"}
    events = [
        event({**chunk, "choices": [{"index": 0, "delta": message, "finish_reason": None}]}),
        event({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
    ]
    if (job.body.get("stream_options") or {}).get("include_usage"):
        events.append(event({**chunk, "choices": [], "usage": usage}))

    async def all_events() -> AsyncIterator[str]:
        for one in (*events, DONE):
            yield one

    response = streamed(all_events())
    response.headers.update(_headers(job, job.asked, headers))
    return response


def read_secrets(config: Config, environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of keys, by name.

    Raises:
        UserError: one is not in the environment, or is that of another key.
    """
    found: dict[str, str] = {}
    for name, key in config.keys.items():
        secret = environment.get(key.secret, "").strip()
        if not secret:
            raise UserError(
                f"the key {name} has its secret in the environment variable {key.secret}, which is not set"
            )
        if secret in found.values():
            raise UserError(f"the key {name} has the same secret as another; give each key its own")
        found[name] = secret
    return found
