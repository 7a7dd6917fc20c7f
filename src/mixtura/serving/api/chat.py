"""Conversations answered: ``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, final

from fastapi import Request, Response

from mixtura.serving.api.answers import (
    DONE,
    Collected,
    Usage,
    Words,
    check_piece,
    collected,
    event,
    respond,
)
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.api.schemas import ChatRequest
from mixtura.serving.api.service import Service
from mixtura.serving.api.wording import Parser
from mixtura.serving.engine.records import Asked, Piece


async def answer_chat(service: Service, request: ChatRequest, http: Request) -> Response:
    """Answer a conversation, at once or as a stream.

    Raises:
        ApiError: it cannot be answered as asked.
    """
    return await respond(lambda: _Chat(service, request), http, stream=request.stream)


@final
class _Chat:
    """One request: its texts, and what it is told."""

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._service = service
        self._request = request
        self._name = service.named(request.model)
        self._words = Words(service.tokenizer)
        self._prompt = service.answering.prompt(request)
        self._asked = self._texts()
        self._usage = Usage(prompt=len(self._asked[0].prompt))
        self._head = {
            "id": service.number("chatcmpl"),
            "created": int(time.time()),
            "model": self._name,
        }

    def _texts(self) -> list[Asked]:
        request, service = self._request, self._service
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if request.stream_options is not None and not request.stream:
            raise ApiError("stream_options needs stream: true", param="stream_options")
        most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        if most == 0:
            raise ApiError("max_tokens must be at least 1", param="max_tokens")
        return service.asked(
            request,
            service.encode(self._prompt, begin=False),
            most=most,
            num_top=(request.top_logprobs or 0) if request.logprobs else None,
            keeps_special=self._parses,
        )

    @property
    def _parses(self) -> bool:
        # What must be JSON is JSON as a whole.
        asked = self._request.response_format
        is_free = asked is None or asked.type == "text"
        return is_free and self._service.answering.parses(self._prompt)

    def _parser(self) -> Parser | None:
        return self._service.answering.parser(self._request, self._prompt) if self._parses else None

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        running = self._service.running(self._asked)
        parts = await collected(running, len(self._asked), self._request.n, self._usage)
        choices = [self._choice(place, part) for place, part in enumerate(parts)]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage.body(),
        }

    def _choice(self, place: int, part: Collected) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        parser = self._parser()
        if parser is not None:
            changes = [*parser.feed(part.text), *parser.end()]
            message["content"] = _joined(changes, "content")
            if reasoning := _joined(changes, "reasoning_content"):
                message["reasoning_content"] = reasoning
            calls = [call for change in changes for call in change.get("tool_calls", ())]
            if calls:
                message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                message["content"] = message["content"] or None
        logprobs = None
        if self._request.logprobs:
            logprobs = {"content": [self._words.entry(token) for token in part.tokens], "refusal": None}
        return {
            "index": place,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": _reason(part.finish, parser),
        }

    async def events(self) -> AsyncIterator[str]:
        """The answer as it comes."""
        parsers = [self._parser() for _ in self._asked]
        begun: set[int] = set()
        async with self._service.running(self._asked) as pieces:
            async for place, piece in pieces:
                check_piece(piece)
                self._usage.add(piece, is_first=place % self._request.n == 0)
                if place not in begun:
                    begun.add(place)
                    yield event(self._chunk(place, {"role": "assistant", "content": ""}))
                for one in self._told(place, piece, parsers[place]):
                    yield event(one)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield event(
                {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage.body()}
            )
        yield DONE

    def _told(self, place: int, piece: Piece, parser: Parser | None) -> list[dict[str, Any]]:
        if parser is None:
            changes: list[dict[str, Any]] = [{"content": piece.text}] if piece.text else []
        else:
            changes = parser.feed(piece.text) if piece.text else []
            changes += parser.end() if piece.is_last else []
        logprobs = None
        if self._request.logprobs and piece.tokens:
            logprobs = {"content": [self._words.entry(token) for token in piece.tokens], "refusal": None}
            changes = changes or [{"content": ""}]
        made = [
            self._chunk(place, change, logprobs=logprobs if number == 0 else None)
            for number, change in enumerate(changes)
        ]
        if piece.finish is not None:
            made.append(self._chunk(place, {}, _reason(piece.finish, parser)))
        return made

    def _chunk(
        self,
        place: int,
        change: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": place, "delta": change, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def _joined(changes: Sequence[dict[str, Any]], name: str) -> str:
    return "".join(change.get(name, "") for change in changes)


def _reason(finish: str, parser: Parser | None) -> str:
    if finish == "stop" and parser is not None and parser.num_calls:
        return "tool_calls"
    return "stop" if finish == "cancelled" else finish
