"""One request, several calls: held for, sent, settled, and tried again elsewhere until one is answered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, final

from mixtura.errors import MixturaError
from mixtura.serving.gateway.books import Books
from mixtura.serving.gateway.calling import Caller, CallError, Frame
from mixtura.serving.gateway.config import Config
from mixtura.serving.gateway.counting import Size, Tokens, counted
from mixtura.serving.gateway.ledger import Hold, Settled
from mixtura.serving.gateway.limiting import Limits
from mixtura.serving.gateway.resting import Rests
from mixtura.serving.gateway.tracing import Tracer
from mixtura.serving.gateway.watching import Watch
from mixtura.types.asking import Outcome
from mixtura.types.models import CHARS_PER_TOKEN, ModelCard

T = TypeVar("T")
# What may be better in a moment; the rest is not, however often one asks.
_PASSING: Final = frozenset({"rate", "timeout", "broken", "down"})
_FIRST_PAUSE_S: Final = 0.1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be answered, whichever model does.

    Attributes:
        request: its number.
        asked: the name that the client asked for.
        account, budget: who pays, and how much there is.
        path: of the API.
        body: as the client sent it.
        size: of the body.
        until: when no call is begun any more, by the clock that only grows.
    """

    request: str
    asked: str
    account: str
    budget: int | None
    path: str
    body: Mapping[str, Any]
    size: Size
    until: float


@final
@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model did not answer, and after how long it might."""

    outcome: Outcome
    after_s: float | None = None
    words: str = ""


class UnansweredError(MixturaError):
    """No model answered; why not, by model."""

    def __init__(self, failures: Mapping[str, Failure]) -> None:
        super().__init__("; ".join(f"{model}: {one.outcome}" for model, one in failures.items()))
        self.failures = dict(failures)


@final
@dataclass(slots=True, eq=False)
class Attempt:
    """One call that money is held for.

    Attributes:
        number: which of the request's calls.
        charged: pico-dollars, once it is settled.
    """

    trier: Trier
    job: Job
    model: str
    hold: Hold
    number: int
    begun: float = field(default_factory=time.monotonic)
    first_ms: float | None = None
    charged: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    _is_settled: bool = False

    def began(self) -> None:
        """The first of the answer is there."""
        if self.first_ms is None:
            self.first_ms = (time.monotonic() - self.begun) * 1000

    def estimate(self, written: int) -> Tokens:
        """Tokens of the call, where the upstream does not say."""
        bound = self.job.size.limit(self.trier.cards[self.model], self.trier.config.most_tokens)
        most = bound * self.job.size.answers
        return Tokens(self.job.size.read_estimate, min(written, most), estimated=True)

    async def settle(self, outcome: Outcome, tokens: Tokens, after_s: float | None = None) -> None:
        """Note what came of it; once."""
        if self._is_settled:
            return
        self._is_settled = True
        total_ms = (time.monotonic() - self.begun) * 1000
        call = Settled(
            outcome=outcome, input_tokens=tokens.read, output_tokens=tokens.written,
            cost=tokens.cost(self.trier.cards[self.model]), estimated=tokens.estimated,
            first_ms=self.first_ms, total_ms=total_ms,
        )  # fmt: skip
        upstream = self.trier.config.models[self.model].upstream
        self.trier.limits.ended(upstream)
        self.trier.rests.saw(self.model, upstream, outcome, after_s)
        self.tokens = tokens
        self.charged = await self.trier.books.settle(self.hold.id, self.hold.account, call, self.job.budget)
        self.trier.watch.called(self.model, call, self.charged)

    def settle_later(self, outcome: Outcome, tokens: Tokens) -> None:
        """The same, where nobody may wait for it: whoever asked has gone."""
        self.trier.later(self.settle(outcome, tokens))


@final
@dataclass(slots=True, eq=False)
class Streaming:
    """An answer that has begun."""

    attempt: Attempt
    held: list[Frame]
    rest: AsyncGenerator[Frame, None]


@final
class Trier:
    """Has requests answered.

    Args:
        config, cards: what there is.
        caller, books, rests, limits, watch, tracer: the parts that it works with.
    """

    def __init__(
        self,
        config: Config,
        cards: Mapping[str, ModelCard],
        *,
        caller: Caller,
        books: Books,
        watch: Watch,
        tracer: Tracer,
    ) -> None:
        self.config = config
        self.cards = cards
        self.caller = caller
        self.books = books
        self.watch = watch
        self.tracer = tracer
        self.rests = Rests(config.resting)
        self.limits = Limits()
        self._tasks: set[asyncio.Task[Any]] = set()

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something that nobody waits for; `finish` does."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for what nobody else waits for."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def whole(self, job: Job, order: Sequence[str]) -> tuple[dict[str, Any], Attempt]:
        """An answer, from the first model of an order that gives one.

        Raises:
            UnansweredError: none did.
            LedgerError: nothing can be spent just now.
        """

        async def send(attempt: Attempt) -> tuple[dict[str, Any], Attempt]:
            body = self._body(attempt, stream=False)
            data = await self.caller.whole(self._upstream(attempt.model), job.path, body)
            attempt.began()
            written = _num_chars(data) // CHARS_PER_TOKEN + 1
            await attempt.settle("ok", counted(data.get("usage"), attempt.estimate(written)))
            return data, attempt

        return await self._first(job, order, send)

    async def stream(self, job: Job, order: Sequence[str]) -> Streaming:
        """The beginning of an answer; until there is some of it, other models are tried.

        Raises:
            UnansweredError: no model began one.
            LedgerError: nothing can be spent just now.
        """

        async def send(attempt: Attempt) -> Streaming:
            body = self._body(attempt, stream=True)
            frames = self.caller.frames(self._upstream(attempt.model), job.path, body)
            held = []
            async for frame in frames:
                held.append(frame)
                if frame.has_content:
                    attempt.began()
                    return Streaming(attempt, held, frames)
            raise CallError("broken")

        return await self._first(job, order, send)

    async def _first(self, job: Job, order: Sequence[str], send: Callable[[Attempt], Awaitable[T]]) -> T:
        failures: dict[str, Failure] = {}
        num = 0
        for turn in itertools.count():
            for model in order:
                is_done = model in failures and failures[model].outcome not in _PASSING
                if is_done or num >= self.config.attempts:
                    continue
                begun = await self._begin(job, model, num + 1)
                if isinstance(begun, Failure):
                    failures[model] = begun
                    continue
                num += 1
                found = await self._tried(begun, send)
                if not isinstance(found, Failure):
                    return found
                failures[model] = found
            waits = [one.after_s or 0.0 for one in failures.values() if one.outcome in _PASSING]
            pause = max(min(waits, default=0.0), _FIRST_PAUSE_S * 2**turn)
            if not waits or num >= self.config.attempts or time.monotonic() + pause > job.until:
                raise UnansweredError(failures)
            await asyncio.sleep(pause)
        raise AssertionError("not reached")

    async def _tried(self, attempt: Attempt, send: Callable[[Attempt], Awaitable[T]]) -> T | Failure:
        try:
            with self.tracer.span("call", model=attempt.model, attempt=attempt.number):
                left = max(attempt.job.until - time.monotonic(), 0.01)
                async with asyncio.timeout(left):
                    return await send(attempt)
        except CallError as error:
            tokens = Tokens() if error.is_free else attempt.estimate(0)
            await attempt.settle(error.outcome, tokens, error.after_s)
            return Failure(error.outcome, error.after_s, error.words)
        except TimeoutError:
            await attempt.settle("timeout", attempt.estimate(0))
            return Failure("timeout")
        except BaseException:
            attempt.settle_later("cancelled", attempt.estimate(0))
            raise

    async def _begin(self, job: Job, model: str, number: int) -> Attempt | Failure:
        """A call that may be sent, with money held for it; else why not."""
        told = self.config.models[model]
        bound = job.size.bound(self.cards[model], self.config.most_tokens, told.template_tokens)
        if bound is None and job.budget is not None:
            return Failure("budget", words="what its images and files cost cannot be known beforehand")
        rest = self.rests.wait_s(model, told.upstream)
        if rest > 0:
            return Failure("down", rest)
        hold = Hold(
            id=uuid.uuid4().hex, account=job.account,
            amount=0 if bound is None else bound.cost(self.cards[model]),
            owner=self.books.owner, request=job.request, asked=job.asked, model=model, sent=time.time(),
        )  # fmt: skip
        may: Failure | None = Failure("cancelled")
        try:
            wait = self.limits.upstream_wait_s(told.upstream, self.config.upstreams[told.upstream])
            if wait is not None:
                may = Failure("rate", float(wait))
            else:
                may = None if await self._held(hold, job.budget) else Failure("budget")
        finally:
            if may is not None:
                # Nobody was asked, so another request may try what has rested.
                self.rests.saw(model, told.upstream, "cancelled")
        if may is not None:
            return may
        self.limits.started(told.upstream)
        return Attempt(self, job, model, hold, number)

    async def _held(self, hold: Hold, budget: int | None) -> bool:
        work = asyncio.ensure_future(self.books.reserve(hold, budget))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.later(self._let_go(work, hold, budget))
            raise

    async def _let_go(self, work: asyncio.Future[bool], hold: Hold, budget: int | None) -> None:
        """Give back what was held for a call that nobody waits for any more, and that was never sent."""
        if await work:
            await self.books.settle(hold.id, hold.account, Settled(outcome="cancelled"), budget)

    def _upstream(self, model: str) -> str:
        return self.config.models[model].upstream

    def _body(self, attempt: Attempt, *, stream: bool) -> dict[str, Any]:
        """What is sent: the client's words, the model's name there, and a limit that money is held for."""
        card, job = self.cards[attempt.model], attempt.job
        limit = self.config.upstreams[self._upstream(attempt.model)].limit_field
        own = {key for key in ("max_tokens", "max_completion_tokens") if job.body.get(key) is not None}
        body = {
            key: value
            for key, value in job.body.items()
            if key not in ("max_tokens", "max_completion_tokens")
        }
        body[own.pop() if len(own) == 1 else limit] = job.size.limit(card, self.config.most_tokens)
        body["model"] = card.model or card.name
        if stream:
            body["stream"] = True
            body["stream_options"] = {**(job.body.get("stream_options") or {}), "include_usage": True}
        return body


def _num_chars(data: Mapping[str, Any]) -> int:
    """Characters of the answers in a body."""
    total = 0
    for choice in data["choices"]:
        message = choice.get("message") or {}
        texts = (choice.get("text"), message.get("content"), message.get("reasoning_content"))
        total += sum(len(text) for text in texts if isinstance(text, str))
        total += len(str(message.get("tool_calls") or ""))
    return total


async def handed_on(
    streaming: Streaming, *, wants_usage: bool, broke: Callable[[CallError], str]
) -> AsyncGenerator[str, None]:
    """The events of an answer that has begun, as its model sends them, and its bill at the end.

    Args:
        streaming: the answer.
        wants_usage: whether the client asked for the event that says how many tokens there were.
        broke: the last event of an answer that breaks off.
    """
    attempt, written, usage = streaming.attempt, 0, None
    outcome: Outcome = "cancelled"
    try:
        try:
            async for frame in _all(streaming):
                written += len(frame.choices) if frame.has_content else 0
                found = (frame.data or {}).get("usage")
                usage = found or usage
                if found and not frame.choices and not wants_usage:
                    continue
                yield frame.raw
            outcome = "ok"
        except CallError as error:
            outcome = error.outcome
            yield broke(error)
    finally:
        # A client that has gone takes the call to the upstream with it.
        attempt.trier.later(_closed(streaming))
        attempt.settle_later(outcome, counted(usage, attempt.estimate(written)))


async def _closed(streaming: Streaming) -> None:
    with contextlib.suppress(CallError):
        await streaming.rest.aclose()


async def _all(streaming: Streaming) -> AsyncIterator[Frame]:
    for frame in streaming.held:
        yield frame
    async for frame in streaming.rest:
        yield frame
