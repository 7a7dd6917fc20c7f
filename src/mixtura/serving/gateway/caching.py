"""Answers given again. Off by default: two texts that mean different things can be near each other.

A near match is taken only where numbers, negations and all words that carry content are the same, the whole
conversation but the last message is the same to the letter, and so are key, model and every parameter. Even
so it can be wrong, and a share of hits is asked anew, so that it is known how often.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np

from mixtura.running.composing.encoder import HashedTfidf
from mixtura.serving.gateway.config import Cache
from mixtura.serving.gateway.deciding import text_of

# Words that say little of what is asked; "not", "no" and their like are no such words.
_LIGHT: Final = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "can",
        "could",
        "do",
        "does",
        "for",
        "from",
        "has",
        "have",
        "i",
        "in",
        "is",
        "it",
        "its",
        "just",
        "kindly",
        "me",
        "my",
        "of",
        "on",
        "or",
        "please",
        "so",
        "tell",
        "than",
        "that",
        "the",
        "their",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "we",
        "were",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)
_WORD: Final = re.compile(r"n't\b|[^\W\d_]+|\d+(?:[.,]\d+)*|[-+*/=<>%^$€£]", re.UNICODE)


def content_of(text: str) -> tuple[str, ...]:
    """What must be the same in two wordings of one question: words of content, in order, numbers, signs.

    >>> content_of("Could you tell me the capital of France?") == content_of("the capital of France, please")
    True
    >>> content_of("Is 5 > 3?") == content_of("Is 3 > 5?")
    False
    """
    return tuple(word for word in _WORD.findall(text.casefold()) if word not in _LIGHT)


@final
@dataclass(slots=True)
class _Entry:
    body: dict[str, Any]
    model: str
    at: float
    group: str
    words: tuple[str, ...]
    vector: Any


@final
@dataclass(slots=True)
class Found:
    """An answer that was given before.

    Attributes:
        kind: ``exact`` or ``near``.
        is_to_verify: whether it is to be asked anew, and compared.
    """

    key: str
    kind: str
    body: dict[str, Any]
    model: str
    is_to_verify: bool


@final
@dataclass(slots=True, eq=False)
class Answers:
    """What was answered lately.

    Attributes:
        verified, right: hits that were asked anew, and those of them that got the same answer again.
    """

    rule: Cache
    clock: Callable[[], float] = time.monotonic
    verified: int = 0
    right: int = 0
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    _encode: HashedTfidf = field(default_factory=lambda: HashedTfidf(512))
    _random: random.Random = field(default_factory=random.Random)

    def find(self, who: str, path: str, body: Mapping[str, Any]) -> Found | None:
        """An answer to a request of somebody, if there is one."""
        if not _may_be_kept(body):
            return None
        key = _key(who, path, body)
        kind = "exact" if self.rule.exact and self._fresh(key) else ""
        if not kind and self.rule.near is not None:
            near = self._nearest(who, path, body)
            key, kind = (near, "near") if near else (key, "")
        if not kind:
            return None
        self._entries.move_to_end(key)
        entry = self._entries[key]
        return Found(key, kind, entry.body, entry.model, self._random.random() < self.rule.verify)

    def keep(self, who: str, path: str, body: Mapping[str, Any], answer: dict[str, Any], model: str) -> None:
        """Remember an answer."""
        if not _may_be_kept(body):
            return
        words, vector = self._last(body) if self.rule.near is not None else ((), None)
        key = _key(who, path, body)
        self._entries[key] = _Entry(answer, model, self.clock(), _group(who, path, body), words, vector)
        self._entries.move_to_end(key)
        while len(self._entries) > self.rule.entries:
            self._entries.popitem(last=False)

    def compare(self, found: Found, answer: Mapping[str, Any]) -> None:
        """Say what came of asking a hit anew; an answer that differs is forgotten."""
        self.verified += 1
        if _texts(found.body) == _texts(answer):
            self.right += 1
        else:
            self._entries.pop(found.key, None)

    def _fresh(self, key: str) -> bool:
        entry = self._entries.get(key)
        if entry is not None and self.clock() - entry.at > self.rule.age_s:
            del self._entries[key]
            return False
        return entry is not None

    def _nearest(self, who: str, path: str, body: Mapping[str, Any]) -> str | None:
        group = _group(who, path, body)
        words, vector = self._last(body)
        best, likest = None, self.rule.near or 1.0
        for key, entry in list(self._entries.items()):
            if entry.group == group and entry.words == words and self._fresh(key):
                cosine = float(np.dot(entry.vector, vector))
                if cosine >= likest:
                    best, likest = key, cosine
        return best

    def _last(self, body: Mapping[str, Any]) -> tuple[tuple[str, ...], Any]:
        text = (
            text_of(body["messages"][-1].get("content")) if body.get("messages") else str(body.get("prompt"))
        )
        return content_of(text), self._encode([text])[0]


def _may_be_kept(body: Mapping[str, Any]) -> bool:
    """Whether the same request may have the same answer: no stream, no tools, nothing drawn anew."""
    drawn = body.get("temperature", 1) not in (0, 0.0) and body.get("seed") is None
    return not (body.get("stream") or body.get("tools") or drawn)


def _key(who: str, path: str, body: Mapping[str, Any]) -> str:
    return json.dumps([who, path, body], sort_keys=True, default=str)


def _group(who: str, path: str, body: Mapping[str, Any]) -> str:
    """Everything of a request but its last words."""
    rest = {key: value for key, value in body.items() if key not in ("messages", "prompt")}
    messages = body.get("messages") or []
    last = [{**messages[-1], "content": None}] if messages else []
    return json.dumps([who, path, rest, messages[:-1], last], sort_keys=True, default=str)


def _texts(answer: Mapping[str, Any]) -> list[str]:
    choices = answer.get("choices") or []
    return [str(one.get("text") or (one.get("message") or {}).get("content")) for one in choices]
