"""Texts continued: ``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
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
from mixtura.serving.api.schemas import MOST_CHOICES, CompletionRequest
from mixtura.serving.api.service import Service
from mixtura.serving.engine.records import Asked, Piece


async def answer_completion(service: Service, request: CompletionRequest, http: Request) -> Response:
    """Continue texts, at once or as a stream.

    Raises:
        ApiError: it cannot be done as asked.
    """
    return await respond(lambda: _Completion(service, request), http, stream=request.stream)


@final
class _Completion:
    """One request: its texts, and what it is told."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._service = service
        self._request = request
        self._name = service.named(request.model)
        self._words = Words(service.tokenizer)
        _check(request)
        self._prompts = self._tokens()
        self._asked = [one for prompt in self._prompts for one in self._texts(prompt)]
        self._usage = Usage(prompt=sum(map(len, self._prompts)))
        self._head = {
            "id": service.number("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }

    def _tokens(self) -> list[tuple[int, ...]]:
        prompt, service = self._request.prompt, self._service
        if isinstance(prompt, str):
            return [service.encode(prompt, begin=True)]
        if not prompt:
            raise ApiError("the prompt is empty; give some text to continue", param="prompt")
        if isinstance(prompt[0], int):
            return [service.check_tokens(prompt)]
        if len(prompt) * self._request.n > MOST_CHOICES:
            raise ApiError(
                f"{len(prompt)} prompts with {self._request.n} answers each are more than the {MOST_CHOICES} "
                "texts that one request may ask for",
                param="prompt",
            )
        return [
            service.encode(one, begin=True) if isinstance(one, str) else service.check_tokens(one)
            for one in prompt
        ]

    def _texts(self, prompt: tuple[int, ...]) -> list[Asked]:
        request = self._request
        # Sixteen is what OpenAI's API gives who does not say.
        most = 16 if request.max_tokens is None else request.max_tokens
        return self._service.asked(
            request,
            prompt,
            most=most,
            num_top=request.logprobs,
            reads_prompt=request.echo and request.logprobs is not None,
        )

    async def whole(self) -> dict[str, Any]:
        """All of it as one object."""
        running = self._service.running(self._asked)
        parts = await collected(running, len(self._asked), self._request.n, self._usage)
        choices = [self._choice(place, part) for place, part in enumerate(parts)]
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    def _choice(self, place: int, part: Collected) -> dict[str, Any]:
        before = self._echoed(place)
        return {
            "index": place,
            "text": before + part.text,
            "logprobs": self._logprobs([*part.prompt, *part.tokens], 0 if part.prompt else len(before)),
            "finish_reason": part.finish,
        }

    def _echoed(self, place: int) -> str:
        if not self._request.echo:
            return ""
        text: str = self._service.tokenizer.decode(
            self._asked[place].prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _logprobs(self, tokens: list[Any], start: int) -> dict[str, Any] | None:
        return None if self._request.logprobs is None else self._words.table(tokens, start)

    async def events(self) -> AsyncIterator[str]:
        """All of it as it comes."""
        offsets: dict[int, int] = {}
        async with self._service.running(self._asked) as pieces:
            async for place, piece in pieces:
                check_piece(piece)
                self._usage.add(piece, is_first=place % self._request.n == 0)
                yield event(self._chunk(place, piece, offsets))
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage.body()})
        yield DONE

    def _chunk(self, place: int, piece: Piece, offsets: dict[int, int]) -> dict[str, Any]:
        text, start = piece.text, offsets.get(place, 0)
        if place not in offsets:
            text = self._echoed(place) + text
        tokens = [*(piece.prompt or ()), *piece.tokens]
        offsets[place] = start + len(text)
        choice = {
            "index": place,
            "text": text,
            "logprobs": self._logprobs(tokens, start) if tokens else None,
            "finish_reason": piece.finish,
        }
        return {**self._head, "choices": [choice]}


def _check(request: CompletionRequest) -> None:
    if request.suffix:
        raise ApiError("text between two others is not something this server writes", param="suffix")
    if request.best_of is not None and request.best_of != request.n:
        raise ApiError("best_of must be n: every text that is made is given", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError("max_tokens of 0 makes sense with echo only; give at least 1", param="max_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options needs stream: true", param="stream_options")
