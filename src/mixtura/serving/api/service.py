"""Requests of the API handed to the engine, and its pieces handed back to where requests are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, final

from mixtura.data.tokens import check_ids, encode_text, num_embeddings_of
from mixtura.errors import suggest
from mixtura.methods import create
from mixtura.methods import names as method_names
from mixtura.methods.decoders import Decoder
from mixtura.serving.api.guiding import Grammars
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.api.schemas import ChatRequest, CompletionRequest, DecoderChoice
from mixtura.serving.api.wording import Answering
from mixtura.serving.engine.deciding import require_served
from mixtura.serving.engine.loop import Engine
from mixtura.serving.engine.records import Asked, Piece, Sampling


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server answers.

    Attributes:
        name: of the model, as clients call it.
        adapters: names of models that are this one with an adapter.
        decoder: decides how answers are made, where a request does not say.
        default_tokens: of an answer, where a request does not say how many.
        most_body_bytes: of a request.
    """

    name: str
    adapters: tuple[str, ...] = ()
    decoder: Decoder | None = None
    default_tokens: int = 1024
    most_body_bytes: int = 4 << 20


@final
class Service:
    """An engine as the API sees it."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.created = int(time.time())
        self.answering = Answering(engine.model, tokenizer)
        self._vocabulary = num_embeddings_of(engine.model.config) or len(tokenizer)
        self._numbers = itertools.count(1)
        ends = engine.end_ids
        self._grammars = Grammars(tokenizer, self._vocabulary, ends)

    def number(self, kind: str) -> str:
        """A name for the next answer."""
        return f"{kind}-{self.created}-{next(self._numbers)}"

    def named(self, name: str | None) -> str:
        """The model that a request means.

        Raises:
            ApiError: it is none that is served here.
        """
        if name is None or name == "default":
            return self.settings.name
        known = [self.settings.name, *self.settings.adapters]
        if name not in known:
            raise ApiError(
                f"this server has no model {name[:200]!r}; {suggest(name, known)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    def encode(self, text: str, *, begin: bool) -> tuple[int, ...]:
        """Tokens of a prompt.

        Raises:
            ApiError: there are none.
            TextError: the model has no embedding for one.
        """
        ids = tuple(encode_text(text, self.tokenizer, self._vocabulary, begin=begin))
        if not ids:
            raise ApiError("the prompt is empty; give some text to continue", param="prompt")
        return ids

    def check_tokens(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Tokens that a request gave as numbers.

        Raises:
            ApiError: there are none.
            TextError: the model has no embedding for one.
        """
        if not ids:
            raise ApiError("the prompt is empty; give some tokens to continue", param="prompt")
        check_ids(ids, self.tokenizer, self._vocabulary)
        return tuple(ids)

    def asked(
        self,
        request: ChatRequest | CompletionRequest,
        prompt: tuple[int, ...],
        *,
        most: int | None,
        num_top: int | None,
        reads_prompt: bool = False,
        keeps_special: bool = False,
    ) -> list[Asked]:
        """The texts that a request asks of the engine for one prompt.

        Raises:
            ApiError: something of it cannot be done.
        """
        room = self.engine.limits.context - len(prompt)
        new = min(self.settings.default_tokens, max(room, 1)) if most is None else most
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        guide = self._grammars.guide(request.response_format)
        group = object() if request.n > 1 else None
        name = self.named(request.model)
        decoder = self._decoder(request, reads_prompt=reads_prompt)
        return [
            Asked(
                prompt=prompt,
                max_new_tokens=new,
                sampling=self._sampling(request, place),
                stops=tuple(stop for stop in stops if stop),
                guide=guide,
                num_top=num_top,
                reads_prompt=reads_prompt,
                keeps_special=keeps_special,
                group=group,
                adapter=name if name in self.settings.adapters else None,
                decoder=decoder,
            )
            for place in range(request.n)
        ]

    def _decoder(self, request: ChatRequest | CompletionRequest, *, reads_prompt: bool) -> Decoder | None:
        """What decides how a request is answered; None for the model as it is.

        Raises:
            ApiError: there is no such decoder, or this server cannot run it here.
            UserError: a setting is wrong, or the decoder cannot go token by token.
        """
        if "decoder" not in request.model_fields_set:
            made = self.settings.decoder
        else:
            made = None if request.decoder is None else _made(request.decoder)
        if made is not None and reads_prompt:
            raise ApiError(
                "log-probabilities of a prompt are the model's as it is; leave echo or the decoder out",
                param="decoder",
            )
        return made

    def _sampling(self, request: ChatRequest | CompletionRequest, place: int) -> Sampling:
        # Several answers of one seed differ, and are the same each time.
        seed = None if request.seed is None else (request.seed + place) % (1 << 63)
        return Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=self._biases(request.logit_bias or {}),
        )

    def _biases(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        made = []
        for token, bias in given.items():
            if not (token.isascii() and token.isdigit() and int(token[:12]) < self._vocabulary):
                raise ApiError(
                    f"logit_bias has {token[:50]!r}, which is no token of this model: give numbers below "
                    f"{self._vocabulary}",
                    param="logit_bias",
                )
            made.append((int(token), bias))
        return tuple(made)

    @asynccontextmanager
    async def running(self, asked: Sequence[Asked]) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
        """Run texts together; what comes of each, by its place among them. Left early, they are taken back.

        Raises:
            UserError: the engine refuses one.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        def tell(place: int) -> Callable[[Piece], None]:
            def put(piece: Piece) -> None:
                # The loop may be gone when a server that is being shut down tells the last of it.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(queue.put_nowait, (place, piece))

            return put

        take_back = self.engine.submit(asked, [tell(place) for place in range(len(asked))])
        try:
            yield _until_all_end(queue, len(asked))
        finally:
            take_back()


def _made(choice: DecoderChoice | str) -> Decoder:
    """A decoder of the catalogue, and of nowhere else: a name from outside opens no file."""
    wanted = DecoderChoice(name=choice) if isinstance(choice, str) else choice
    names = [one.strip() for one in wanted.name.split(",") if one.strip()]
    known = method_names("decoders")
    for one in names:
        if one not in known:
            raise ApiError(
                f"this server knows no decoder {one[:200]!r}; {suggest(one, known)}", param="decoder"
            )
    if not names or (wanted.settings and len(names) > 1):
        raise ApiError("decoder wants a name, such as scmoe; settings belong to one alone", param="decoder")
    return require_served([create("decoders", one, **wanted.settings) for one in names])


async def _until_all_end(
    queue: asyncio.Queue[tuple[int, Piece]], num: int
) -> AsyncIterator[tuple[int, Piece]]:
    while num:
        place, piece = await queue.get()
        num -= piece.is_last
        yield place, piece
