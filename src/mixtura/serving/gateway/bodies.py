"""What a gateway reads of requests; whatever else they say goes on to the model that answers."""

from __future__ import annotations

from abc import ABC
from typing import Annotated, Any, final

from pydantic import BaseModel, ConfigDict, Field

from mixtura.serving.api.schemas import MOST_CHOICES, NumTokens, TokenId

_OPEN = ConfigDict(extra="allow", allow_inf_nan=False)
_Text = Annotated[str, Field(max_length=256)]


class Asking(BaseModel, ABC):
    """What both kinds of requests say."""

    model_config = _OPEN
    model: _Text
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: NumTokens | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


@final
class ChatBody(Asking):
    """A conversation to answer."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: NumTokens | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


@final
class CompletionBody(Asking):
    """A text to continue."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None


@final
class FeedbackBody(BaseModel):
    """How good an answer was.

    Attributes:
        request: the header ``x-mixtura-request`` of the answer.
        score: from 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    request: _Text
    score: Annotated[float, Field(ge=0, le=1)]
