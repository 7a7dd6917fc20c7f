"""Requests to an engine, and what came of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtura.running.resolve import resolve_model
from mixtura.serving.engine.loop import Engine
from mixtura.serving.engine.records import Asked, Piece, Sampling

# The model that comes with mixtura, with a chat template.
SPECIMEN = resolve_model(None).path
GREEDY = Sampling(temperature=0)
PATIENCE_S = 120


@dataclass
class Answer:
    """Everything that a request was told."""

    pieces: list[Piece] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)

    def take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.began.set()
        if piece.is_last:
            self.over.set()

    def wait(self) -> Answer:
        assert self.over.wait(PATIENCE_S), "no last piece came"
        return self

    @property
    def ids(self) -> list[int]:
        return [token.token for piece in self.pieces for token in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish

    @property
    def error(self) -> Exception | None:
        return self.pieces[-1].error

    @property
    def num_cached(self) -> int | None:
        return next((p.num_cached for p in self.pieces if p.num_cached is not None), None)


def asked(prompt: Sequence[int], max_new_tokens: int = 12, **more: Any) -> Asked:
    return Asked(prompt=tuple(prompt), max_new_tokens=max_new_tokens, **{"sampling": GREEDY, **more})


def send(engine: Engine, *requests: Asked) -> list[Answer]:
    """Hand all over before the first is done."""
    answers = [Answer() for _ in requests]
    engine.submit(requests, [answer.take for answer in answers])
    return answers


def answered(engine: Engine, *requests: Asked) -> list[Answer]:
    return [answer.wait() for answer in send(engine, *requests)]
