"""What both kinds of answers share: usage, tokens in words, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, final

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from mixtura.serving.api.refusals import ApiError, refusal_of
from mixtura.serving.engine.records import Piece, Token

DONE = "data: [DONE]\n\n"
_POLL_S = 0.25
T = TypeVar("T")


@final
@dataclass(slots=True)
class Usage:
    """Tokens that an answer took."""

    prompt: int = 0
    cached: int = 0
    new: int = 0

    def add(self, piece: Piece, *, is_first: bool) -> None:
        """Count a piece; of several answers to one prompt, the first says what was read before."""
        self.new += len(piece.tokens)
        if is_first:
            self.cached += piece.num_cached or 0

    def body(self) -> dict[str, Any]:
        """As clients read it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@final
@dataclass(slots=True)
class Collected:
    """All of one text's answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: tuple[Token, ...] = ()
    finish: str = "stop"

    def add(self, piece: Piece) -> None:
        """Take what came.

        Raises:
            ApiError: the text failed.
        """
        check_piece(piece)
        self.text += piece.text
        self.tokens.extend(piece.tokens)
        self.prompt = self.prompt or piece.prompt or ()
        self.finish = piece.finish or self.finish


class Job(Protocol):
    """One request that is being answered."""

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""

    def events(self) -> AsyncIterator[str]:
        """The answer as it comes."""


async def respond(make: Callable[[], Job], http: Request, *, stream: bool) -> Response:
    """Answer a request, at once or as a stream.

    Raises:
        ApiError: it cannot be answered as asked.
    """
    # Wording, encoding and grammars of large requests take long: not where others are answered.
    job = await run_in_threadpool(make)
    if not stream:
        return JSONResponse(await until_gone(http, job.whole()))
    # The first piece is waited for, so that a refusal still has a status of its own.
    events = job.events()
    return streamed(chained(await until_gone(http, anext(events)), events))


async def chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    """Events whose first was waited for already."""
    yield first
    async for one in rest:
        yield one


async def collected(
    running: AbstractAsyncContextManager[AsyncIterator[tuple[int, Piece]]], num: int, each: int, usage: Usage
) -> list[Collected]:
    """All of so many texts' answers, ``each`` of them to one prompt.

    Raises:
        ApiError: one failed.
    """
    parts = [Collected() for _ in range(num)]
    async with running as pieces:
        async for place, piece in pieces:
            parts[place].add(piece)
            usage.add(piece, is_first=place % each == 0)
    return parts


def check_piece(piece: Piece) -> None:
    """Refuse a piece that says that its text failed.

    Raises:
        ApiError: it does.
    """
    if piece.error is not None:
        raise refusal_of(piece.error)


def event(body: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(body)}\n\n"


def streamed(events: AsyncIterator[str]) -> Response:
    """A response of server-sent events; an error that comes after the first is one of them."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except Exception as error:
            # The status is out already; clients look for an event with an error in it.
            yield event(refusal_of(error).body)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """What some work comes to, given up when the client that wants it has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client went away", status=499)
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_POLL_S)


@final
class Words:
    """Tokens as clients read them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> str:
        """The text of a token alone."""
        made: str = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return made

    def entry(self, token: Token) -> dict[str, Any]:
        """A token and the likeliest in its place, as chats list them."""
        return self._one(token.token, token.logprob) | {
            "top_logprobs": [self._one(other.token, other.logprob) for other in token.top]
        }

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.of(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    def table(self, tokens: list[Token], start: int) -> dict[str, Any]:
        """Tokens as completions list them; ``start`` is where in the text the first begins."""
        texts = [self.of(token.token) for token in tokens]
        offsets, place = [], start
        for text in texts:
            offsets.append(place)
            place += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                None
                if token.logprob is None
                else {self.of(other.token): _finite(other.logprob) for other in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _finite(logprob: float | None) -> float | None:
    # JSON has no infinity; this is what OpenAI writes for a probability of nothing.
    return None if logprob is None else max(logprob, -9999.0)
