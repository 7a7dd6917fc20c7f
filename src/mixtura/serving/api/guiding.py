"""Answers that must be JSON: llguidance says which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import one_line
from mixtura.serving.api.refusals import ApiError
from mixtura.serving.api.schemas import ResponseFormat
from mixtura.serving.engine.records import Guide

_BITS = 32


@final
class JsonGuide:
    """Lets come what a grammar of llguidance allows; an `mixtura.serving.engine.records.Guide`."""

    def __init__(self, matcher: Any, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids

    def restrict(self, logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """The logits with what may not come at minus infinity."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        bits = (words[:, None] >> torch.arange(_BITS, dtype=torch.int32)) & 1
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        known = bits.reshape(-1).bool()[: len(logits)]
        allowed[: len(known)] = known
        if not bool(allowed.any()):
            # Nothing of the vocabulary fits: the text ends here.
            allowed[list(self._end_ids)] = True
        return logits.masked_fill(~allowed, float("-inf"))

    def take(self, token: int) -> None:
        """A token was chosen."""
        if token not in self._end_ids:
            self._matcher.consume_token(token)

    @property
    def is_over(self) -> bool:
        """Whether the text is whole."""
        return bool(self._matcher.is_stopped())


@final
class Grammars:
    """Makes guides for the vocabulary of one tokenizer, which is worked out once, when it is first needed."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._made: Any = None
        self._lock = threading.Lock()

    def guide(self, asked: ResponseFormat | None) -> Callable[[], Guide] | None:
        """What makes a guide for each text of a request; None where its form is free.

        Raises:
            ApiError: the schema cannot be followed, or nothing is installed that could.
        """
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            schema: Any = {"type": "object"}
        elif asked.json_schema is None:
            raise ApiError(
                'response_format of type "json_schema" needs "json_schema" with a "schema"',
                param="response_format.json_schema",
            )
        else:
            schema = asked.json_schema.json_schema
        library, known = self._library()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_flexible": False}
            )
            problem = library.LLMatcher.validate_grammar(grammar, known)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise ApiError(
                f"the schema in response_format cannot be followed: {one_line(problem, 300)}",
                param="response_format",
            )
        return lambda: JsonGuide(library.LLMatcher(known, grammar), self._end_ids)

    def _library(self) -> tuple[Any, Any]:
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise ApiError(
                "this server has no llguidance installed, which answers in JSON need; its operator can "
                "install mixtura[serve]",
                param="response_format",
            ) from None
        with self._lock:
            if self._made is None:
                self._made = self._built(llguidance.hf)
        return llguidance, self._made

    def _built(self, library: Any) -> Any:
        try:
            return library.from_tokenizer(self._tokenizer, self._vocabulary, sorted(self._end_ids) or None)
        except Exception as error:
            # Kinds of tokenizers that the library cannot take apart; it raises what it likes.
            raise ApiError(
                f"answers in JSON are not possible with this model's tokenizer: {one_line(error, 200)}",
                param="response_format",
            ) from None
