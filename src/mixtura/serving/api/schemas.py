"""What requests may say: the fields of OpenAI's API that this server heeds, and nothing else."""

from __future__ import annotations

from abc import ABC
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 64
MOST_TOP = 20
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NumTokens = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Stop = Annotated[str, Field(max_length=256)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)] | None
Bias = Annotated[float, Field(ge=-100, le=100)]


@final
class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = _STRICT
    include_usage: bool = False


@final
class JsonSchema(BaseModel):
    """A schema that an answer must follow."""

    model_config = _STRICT
    name: str = ""
    description: str | None = None
    # ``schema`` is a method of pydantic's models.
    json_schema: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


@final
class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = _STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


@final
class TextPart(BaseModel):
    """A part of a message."""

    model_config = _STRICT
    type: Literal["text"]
    text: str


@final
class CalledFunction(BaseModel):
    """A function and its arguments, as JSON in a string."""

    model_config = _STRICT
    name: str
    arguments: str


@final
class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = _STRICT
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


@final
class Message(BaseModel):
    """A message of a conversation."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


@final
class Function(BaseModel):
    """A function that an answer may call."""

    model_config = _STRICT
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@final
class Tool(BaseModel):
    """A tool that an answer may call."""

    model_config = _STRICT
    type: Literal["function"]
    function: Function


@final
class DecoderChoice(BaseModel):
    """A decoder of the catalogue, or several with commas, and the settings of one."""

    model_config = _STRICT
    name: Annotated[str, Field(max_length=1024)]
    settings: Annotated[dict[str, Any], Field(max_length=64)] = Field(default_factory=dict)


class _Common(BaseModel, ABC):
    """What both kinds of requests may say; the last fields change nothing here, but clients send them."""

    model_config = _STRICT
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: NumTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stops = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    decoder: DecoderChoice | Annotated[str, Field(max_length=1024)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


@final
class ChatRequest(_Common):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@final
class CompletionRequest(_Common):
    """A text to continue."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: ResponseFormat | None = None
    suffix: str | None = None
